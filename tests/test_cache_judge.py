"""Whether two answers say the same, by the gateway's own judge: answers of a library's desk, with real embeddings."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from app.cache.embedder import local
from app.cache.judge import FEW, Answer, Judge, answer

SAID = {
    "renew": (
        "You can renew a loan twice, online or at the desk, unless somebody else has reserved the book.",
        "Renewing is possible two times as long as nobody waits for that book; do it at the desk or on our site.",
        "As long as the book is not reserved by another reader you may extend your loan twice, in person or online.",
    ),
    "fine": (
        "A late book costs 20 cents a day. The fine stops growing at 10 dollars, and you pay it at the desk.",
        "For each day that a book is overdue we charge 20 cents, up to 10 dollars, payable at the desk.",
        "Overdue books are charged at 20 cents per day with a maximum of 10 dollars. Please pay at the desk.",
    ),
    "card": (
        "Bring an identity card and a bill with your address, and you get a library card on the spot, for free.",
        "A library card is free and made at once: all we need is an ID and a bill that shows where you live.",
        "To get a card show us your identity card and a letter with your address. It is free and ready at once.",
    ),
    "rooms": (
        "Study rooms are booked on the website for up to three hours, and seat six people.",
        "Book a study room through our website. It has six seats and is yours for three hours at most.",
        "For a group of up to six you can reserve one of the study rooms online, for no more than three hours.",
    ),
    "lost": (
        "If you have lost a book, tell the desk. You pay its price, or bring the same edition.",
        "Report lost books at the desk: you replace them with the same edition or pay what they cost.",
        "A lost book has to be paid for or replaced by another copy of that edition; let the desk know.",
    ),
    "print": (
        "The printers on the first floor take your card. Black and white pages are cheap, colour ones are not.",
        "Print on the first floor with your card; colour is expensive, black and white is not.",
        "There are printers on the first floor. Load money on your card; colour pages cost a lot more than plain ones.",
    ),
    "children": (
        "Every Saturday morning we read aloud to children under seven in the garden room.",
        "On Saturday mornings there is a reading hour for children below seven, held in the garden room.",
        "Small children, not yet seven, are read to in the garden room each Saturday morning.",
    ),
    "ebooks": (
        "E-books are lent through our app for two weeks and vanish from your device by themselves.",
        "With the app you borrow e-books for two weeks; afterwards they disappear from the device on their own.",
        "An e-book lent in the app stays two weeks, then it is removed from your device automatically.",
    ),
}  # fmt: skip
POLITE = "Thank you for asking the city library! {} We are always happy to help. See you soon at the city library."


@pytest.fixture(scope="module", params=["static", "minilm"])
def embed(request: pytest.FixtureRequest) -> object:
    return local(request.param).load_now()


def heard(embed: object, frame: str = "{}", turns: int = 5) -> tuple[Judge, dict[str, list[Answer]]]:
    """A judge that has heard every answer a few times, and the answers."""
    judge = Judge()
    said = {name: [answer(frame.format(text), embed(frame.format(text))) for text in texts]
            for name, texts in SAID.items()}  # fmt: skip
    for _ in range(turns):
        for place in range(3):
            for answers in said.values():
                judge.hear(answers[place])
    return judge, said


@pytest.mark.parametrize("frame", ["{}", POLITE])
def test_other_words_for_the_same_are_the_same_and_other_things_are_not(embed: object, frame: str) -> None:
    judge, said = heard(embed, frame)
    same = [judge.alike(one, [other]) for answers in said.values() for one, other in combinations(answers, 2)]
    other = [
        judge.alike(one, [two])
        for first, second in combinations(said.values(), 2)
        for one, two in product(first, second)
    ]
    assert sum(same) >= 0.75 * len(same)
    assert sum(other) <= 0.01 * len(other)


def test_a_number_that_is_another_is_another_answer_and_one_more_is_none(embed: object) -> None:
    judge, said = heard(embed)
    text = SAID["fine"][0]
    other, more = text.replace("20 cents", "50 cents"), SAID["fine"][1] + " So it has been since 2026."
    assert not judge.alike(answer(other, embed(other)), said["fine"][:1])
    assert judge.alike(answer(more, embed(more)), said["fine"][:1])


def test_what_is_filled_into_a_form_counts(embed: object) -> None:
    judge, _ = heard(embed)
    form = "The opening hours of the branch in {} are {} longer in summer, as you can read at its door."
    ask = [form.format(*words) for words in (("Bergen", "never"), ("Oslo", "never"), ("Bergen", "always"))]
    first, place, turned = (answer(text, embed(text)) for text in ask)
    assert not judge.alike(place, [first])
    assert not judge.alike(turned, [first])


def test_until_it_has_heard_enough_only_the_same_words_are_the_same(embed: object) -> None:
    judge, said = heard(embed, turns=1)
    assert 3 * len(SAID) < FEW
    one, two, _ = said["rooms"]
    assert judge.alike(one, [one])
    assert not judge.alike(one, [two])


def test_where_answers_come_in_the_same_words_nothing_else_counts(embed: object) -> None:
    judge, said = heard(embed)
    one, two, _ = said["rooms"]
    groups = {"a": [one], "b": said["lost"]}
    assert judge.agreeing(two, groups) == ()
    for _ in range(60):
        judge.agreeing(two, groups)
    assert judge.agreeing(two, groups) == ("a",)
    for _ in range(600):
        judge.agreeing(one, groups)
    assert judge.agreeing(one, groups) == ("a",)
    assert judge.agreeing(two, groups) == ()


def test_what_it_takes_for_the_same_among_answers_to_other_things_is_its_error(embed: object) -> None:
    judge, said = heard(embed)
    compared = [judge.hear(one) for answers in said.values() for one in answers]
    assert all(count == 8 for count, _ in compared)
    strangers, agreed = (sum(part) for part in zip(*compared, strict=True))
    assert agreed / strangers < 0.3  # of eight subjects one is the same


def test_without_vectors_only_the_same_words_are_the_same() -> None:
    judge = Judge()
    one, two = (answer(text, None) for text in SAID["rooms"][:2])
    assert judge.hear(one) == (0, 0)
    assert judge.alike(one, [answer(SAID["rooms"][0].upper(), None)])
    assert not judge.alike(one, [two])
