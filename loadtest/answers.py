"""Made-up answers to labels: always the same facts, in one wording or in one of several.

Six facts of a label are drawn from POINTS by its name, so that two labels share some, as answers about one business do.
A wording chooses one of a fact's forms, the order of the facts, and how the label is called.
"""

from __future__ import annotations

import random

FACTS = 6
WORDINGS = 5
POINTS = (
    ("It takes three working days.", "Allow 3 working days for it.", "You have to wait three business days."),
    ("It is done within a minute.", "This happens in less than a minute.", "One minute later it is through."),
    ("There is no fee.", "It costs nothing.", "We do it free of charge."),
    ("We charge a small fee.", "A modest fee applies.", "There is a little charge for that."),
    ("Open the settings page first.", "Start on the page with your settings.", "Go to settings to begin."),
    ("Call our hotline.", "Ring the hotline, please.", "Please phone us."),
    ("Write to us in the chat.", "Send a message in the chat.", "Use the chat window to write to us."),
    ("You need your passport.", "Have your passport at hand.", "A passport is required."),
    ("Your post code must be right.", "Check that the post code is correct.", "Make sure of your post code."),
    ("It works abroad as well.", "You can use it in other countries too.", "This is available abroad."),
    ("It only works at home.", "Other countries are not supported.", "You cannot use it outside your country."),
    ("An e-mail confirms it.", "You get a confirmation by e-mail.", "We send an e-mail to confirm."),
    ("A letter comes by post.", "Expect a letter in the mail.", "We will send you a letter."),
    ("Restart the app when it fails.", "If it fails, start the app again.", "On an error close the app and open it."),
    ("Your password is asked for.", "Enter your password when asked.", "You will be prompted for the password."),
    ("The limit is shown on top.", "At the top you see the limit.", "See the limit in the header."),
    ("Only adults can do it.", "You have to be of age.", "It is for grown-ups alone."),
    ("Weekends do not count.", "Saturdays and Sundays are left out.", "We do not work at weekends."),
    ("You can undo it later.", "It can be reversed afterwards.", "Later on you may take it back."),
    ("It cannot be undone.", "This is final.", "There is no way back from it."),
    ("The shop decides on it.", "It is up to the merchant.", "The seller has the last word."),
    ("Ask the other bank.", "Your other bank knows more.", "Please turn to the other bank."),
    ("Keep the receipt.", "Do not throw the receipt away.", "You will need the receipt."),
    ("Take a picture of the document.", "Photograph the paper.", "We need a photo of that document."),
    ("The rate changes every day.", "Rates are new each day.", "It depends on the day's rate."),
    ("You see it in your history.", "It appears among your past activity.", "Your history lists it."),
    ("Two people have to agree.", "A second person must confirm.", "Somebody else has to approve as well."),
    ("The map shows the nearest place.", "Find the closest place on the map.", "Look at the map for one nearby."),
    ("Your balance must be high enough.", "Enough money has to be there.", "Make sure there are funds."),
    ("We block it at once.", "It is locked immediately.", "At once nobody can use it."),
)
_INTRODUCTIONS = ("About {}:", "As for {}:", "{}, in short:", "Your question is about {}.", "This is how {} works.")


def answer(label: str, wording: int = 0) -> str:
    """The answer to a label in its n-th wording; 0 is the plain one."""
    topic = label.replace("_", " ")
    facts = random.Random(label).sample(POINTS, FACTS)
    if wording == 0:
        return " ".join([_INTRODUCTIONS[0].format(topic), *(fact[0] for fact in facts)])
    draw = random.Random(f"{label} {wording}")
    draw.shuffle(facts)
    return " ".join([draw.choice(_INTRODUCTIONS).format(topic), *(draw.choice(fact) for fact in facts)])
