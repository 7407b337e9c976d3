"""The words that guards look for: data, from general English (and the negations of six more languages)."""

from __future__ import annotations

FUNCTION_WORDS = frozenset(
    """a an the i me my mine myself we us our ours you your yours he him his she her hers it its they them their theirs
    this that these those there here is am are was were be been being do does did doing done have has had having will
    would can could should shall might must ought of in on at for to from by with about into onto upon over up out off
    and or but if so as then than because while though although that's it's i'm i've i'd i'll you're we're they're
    what's there's how's who's let's what which who whom whose when where why how please hi hello hey dear thanks thank
    kindly just also too very really quite still yet already again even actually basically currently now some any
    there anyone someone something anything everything thing things way ways get gets getting got want wants wanted need
    needs needed wish like would know tell say explain show give help helps trying try tried let lets make makes made
    go goes going come possible able sure ok okay well oh um problem question info information due regarding
    """.split()  # noqa: SIM905
)
"""Words that carry no subject: another one of them makes no other question. Negations are never among them."""

NEGATIONS = frozenset(
    """not no never none nothing nobody nowhere neither nor without cannot unable except unless excluding
    cant dont doesnt didnt wont isnt arent wasnt werent hasnt havent hadnt couldnt shouldnt wouldnt aint
    nicht kein keine keinen keiner nie niemals ohne pas jamais sans aucun aucune nunca jamás ningún ninguna senza
    não nunca nem sem niet geen nooit zonder""".split()  # noqa: SIM905
)

NUMBER_WORDS = {
    word: str(value)
    for value, words in {
        0: "zero", 2: "two twice double second couple both", 3: "three thrice triple third", 4: "four fourth",
        5: "five fifth", 6: "six sixth", 7: "seven seventh", 8: "eight eighth", 9: "nine ninth", 10: "ten tenth",
        11: "eleven", 12: "twelve dozen", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen",
        17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty", 30: "thirty", 40: "forty", 50: "fifty",
        60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety", 100: "hundred", 1000: "thousand", 1000000: "million",
        1000000000: "billion",
    }.items()
    for word in words.split()
} | {"half": "0.5", "quarter": "0.25", "single": "1", "once": "1"}  # fmt: skip
"""`one` and `first` are left out: they are pronouns and fillers more often than numbers."""

MULTIPLES = {"k": 1_000, "m": 1_000_000, "bn": 1_000_000_000, "mn": 1_000_000}

CURRENCIES = {"$": "usd", "€": "eur", "£": "gbp", "¥": "jpy", "₹": "inr"}

UNITS = {
    form: unit
    for unit, forms in {
        "second": "second seconds sec secs", "minute": "minute minutes min mins", "hour": "hour hours hr hrs hourly",
        "day": "day days daily", "week": "week weeks weekly", "fortnight": "fortnight fortnights",
        "month": "month months monthly", "quarter": "quarters quarterly", "year": "year years yearly annual annually",
        "decade": "decade decades", "century": "century centuries", "ms": "ms millisecond milliseconds",
        "usd": "usd dollar dollars buck bucks", "eur": "eur euro euros", "gbp": "gbp sterling quid",
        "jpy": "jpy yen", "inr": "inr rupee rupees", "chf": "chf franc francs", "aud": "aud", "cad": "cad",
        "cny": "cny yuan", "sek": "sek", "nok": "nok", "dkk": "dkk", "pln": "pln zloty", "rub": "rub rouble ruble",
        "btc": "btc bitcoin bitcoins", "eth": "eth ether ethereum", "cent": "cent cents penny pence",
        "pound": "pound pounds lb lbs", "kg": "kg kgs kilo kilos kilogram kilograms", "gram": "gram grams gramme",
        "mg": "mg milligram milligrams", "ounce": "ounce ounces oz", "ton": "ton tons tonne tonnes",
        "stone": "stones", "km": "km kms kilometer kilometers kilometre kilometres",
        "metre": "metre metres meter meters", "cm": "cm centimeter centimeters centimetre centimetres",
        "mm": "mm millimeter millimeters millimetre millimetres", "mile": "mile miles", "yard": "yard yards",
        "foot": "ft feet", "inch": "inch inches", "litre": "litre litres liter liters", "ml": "ml milliliter",
        "gallon": "gallon gallons", "pint": "pint pints", "cup": "cup cups", "tablespoon": "tablespoon tbsp",
        "teaspoon": "teaspoon teaspoons tsp", "celsius": "celsius centigrade", "fahrenheit": "fahrenheit",
        "kelvin": "kelvin", "kb": "kb kilobyte kilobytes", "mb": "mb megabyte megabytes", "gb": "gb gigabyte gigabytes",
        "tb": "tb terabyte terabytes", "kbps": "kbps", "mbps": "mbps", "gbps": "gbps", "bit": "bit bits",
        "byte": "byte bytes", "percent": "percent percentage pct", "degree": "degree degrees", "watt": "watt watts",
        "kw": "kw kilowatt kilowatts", "kwh": "kwh", "volt": "volt volts", "amp": "amp amps ampere amperes",
        "hz": "hz hertz", "mhz": "mhz", "ghz": "ghz", "mph": "mph", "kph": "kph kmh", "calorie": "calorie kcal",
        "joule": "joule joules", "psi": "psi", "bar": "bars", "acre": "acre acres", "hectare": "hectare hectares",
        "am": "am", "pm": "pm",
    }.items()
    for form in forms.split()
}  # fmt: skip

MONTHS = frozenset(
    """january february march april may june july august september october november december jan feb mar apr jun jul aug
    sep sept oct nov dec""".split()  # noqa: SIM905
)
WEEKDAYS = frozenset("monday tuesday wednesday thursday friday saturday sunday weekend weekday".split())  # noqa: SIM905
RELATIVE_DAYS = frozenset(
    "today tomorrow yesterday tonight morning afternoon evening noon midnight spring summer autumn winter".split()  # noqa: SIM905
)

_OPPOSITES = """
enable disable; activate deactivate; buy sell; purchase sell; open close; opened closed; lock unlock; start stop;
begin end; begin finish; start finish; start end; increase decrease; raise lower; increase reduce; increase lower;
raise reduce; add remove; add delete; create delete; create destroy; install uninstall; connect disconnect; subscribe
unsubscribe; login logout; signin signout; on off; up down; upgrade downgrade; upload download; import export; send
receive; sent received; give take; lend borrow; deposit withdraw; credit debit; win lose; won lost; pass fail; accept
reject; accept decline; approve reject; approve deny; approve decline; allow deny; allow forbid; allow block; allow
prevent; permit forbid; grant revoke; block unblock; ban unban; mute unmute; hide show; hide unhide; include exclude;
include omit; push pull; pushed pulled; attach detach; mount unmount; encrypt decrypt; encode decode; compress
decompress; compress extract; zip unzip; freeze unfreeze; pause resume; follow unfollow; like dislike; love hate; load
unload; pack unpack; wrap unwrap; fold unfold; tie untie; pin unpin; save discard; save spend; keep discard; keep
remove; hire fire; arrive depart; arrive leave; arrival departure; enter exit; enter leave; join leave; come go;
ascend descend; ascending descending; rise fall; grow shrink; expand collapse; expand contract; expand shrink;
maximize minimize; maximise minimise; maximum minimum; max min; most least; more less; more fewer; higher lower; high
low; highest lowest; large small; larger smaller; largest smallest; big small; bigger smaller; biggest smallest; long
short; longer shorter; longest shortest; tall short; wide narrow; thick thin; heavy light; fast slow; faster slower;
fastest slowest; quick slow; hot cold; hotter colder; warm cool; heat cool; early late; earlier later; earliest
latest; before after; first last; previous next; past future; old new; old young; older newer; older younger; oldest
newest; ancient modern; good bad; better worse; best worst; right wrong; right left; correct incorrect; true false;
valid invalid; legal illegal; safe dangerous; safe unsafe; secure insecure; public private; free paid; cheap
expensive; cheaper pricier; cheapest dearest; rich poor; full empty; fill empty; hard easy; hard soft; easy difficult;
simple complex; strong weak; alive dead; awake asleep; wet dry; clean dirty; sharp blunt; smooth rough; same
different; similar different; equal unequal; always never; inside outside; indoor outdoor; indoors outdoors; internal
external; input output; inbound outbound; incoming outgoing; inward outward; above below; over under; top bottom;
upper lower; front back; forward backward; forwards backwards; forward reverse; north south; east west; northern
southern; eastern western; vertical horizontal; parent child; male female; man woman; men women; boy girl; husband
wife; brother sister; mother father; mum dad; son daughter; king queen; day night; morning evening; sunrise sunset;
dawn dusk; winter summer; breakfast dinner; lunch dinner; breakfast lunch; domestic international; domestic foreign;
local foreign; local remote; local international; online offline; manual automatic; temporary permanent; temporarily
permanently; optional mandatory; optional required; voluntary mandatory; positive negative; plus minus; profit loss;
gain loss; gain lose; asset liability; revenue expense; income expense; supply demand; employer employee; buyer
seller; lender borrower; landlord tenant; sender recipient; sender receiver; teacher student; doctor patient; client
server; host guest; prepaid postpaid; virtual physical; digital physical; paper electronic; gross net; wholesale
retail; presence absence; present absent; attack defend; attack defense; win loss; succeed fail; success failure;
allow disallow; agree disagree; appear disappear; approve disapprove; trust distrust; obey disobey; assemble
disassemble; engage disengage; check uncheck; select deselect; select unselect; mark unmark; archive unarchive;
publish unpublish; link unlink; bind unbind; do undo; redo undo; cancel confirm; cancel keep; cancel reinstate; cancel
renew; renew expire; extend shorten; confirm deny; admit deny; ask answer; question answer; teach learn; build
demolish; break fix; damage repair; hurt heal; remember forget; find lose; found lost; lost recovered; hit miss; catch
throw; float sink; laugh cry; live die; born died; birth death; marry divorce; sit stand; wake sleep; speak listen;
read write; reader writer; tighten loosen; lengthen shorten; strengthen weaken; widen narrow; brighten darken;
brighten dim; bright dark; bright dim; loud quiet; increase decreasing; rising falling; ceiling floor; majority
minority; singular plural; analog digital; synchronous asynchronous; sync async; serial parallel; static dynamic;
mutable immutable; with without; for against; pro con; advantage disadvantage; benefit drawback; strength weakness;
liked disliked; honest dishonest; polite rude; happy sad; happy unhappy; lucky unlucky; healthy sick; healthy
unhealthy; common rare; usual unusual; known unknown; visible invisible; possible impossible; reversible irreversible;
regular irregular; even odd; acid base; acidic alkaline; entry exit; entrance exit; takeoff landing; launch land;
boarding disembarking; checkin checkout; pickup dropoff; pick drop; refund charge; refund pay; owe own; borrow repay;
rent buy; lease buy; own rent; gift sell; donate receive; whitelist blacklist; allowlist blocklist; allowlist
denylist; employ dismiss; promote demote; encourage discourage; praise criticise; praise criticize; support oppose;
vegetarian meat; vegan meat; sweet sour; raw cooked; fresh frozen; fresh stale; freeze thaw; boil freeze; melt freeze;
solid liquid
"""


def _pairs() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for pair in _OPPOSITES.replace("\n", " ").split(";"):
        if pair.strip():
            one, other = pair.split()
            found.setdefault(one, set()).add(other)
            found.setdefault(other, set()).add(one)
    return {word: frozenset(others) for word, others in found.items()}


OPPOSITES = _pairs()
"""Each word and those that turn a question with it over."""

REVERSING = ("un", "dis", "de", "in", "im", "ir", "il", "non", "mis", "anti", "mal")
"""Where one word is the other with one of these before it, they are opposites: `mount`, `unmount`."""

ROLE_MARKERS = frozenset("from to into by than over under before after for with against between of".split())  # noqa: SIM905
"""Words that say which part the next noun has."""

_LANGUAGE_WORDS = {
    "en": "the is are my how what why can do does i to of and for with this that you have not when where please",
    "de": "der die das ist sind mein meine wie was warum kann ich zu von und für mit nicht wenn wo bitte ein eine den",
    "fr": "le la les est sont mon ma mes comment que pourquoi peux je à de et pour avec pas quand où un une des du",
    "es": "el la los las es son mi mis cómo como qué que por puedo yo de y para con no cuándo dónde un una del",
    "it": "il lo la gli le è sono mio mia come che perché posso io di e per con non quando dove un una del della",
    "pt": "o a os as é são meu minha como que por posso eu de e para com não quando onde um uma do da",
    "nl": "de het is zijn mijn hoe wat waarom kan ik te van en voor met niet wanneer waar een alstublieft",
    "sv": "och är min hur vad varför kan jag att av för med inte när var en ett den det",
    "pl": "i jest są mój moja jak co dlaczego mogę do z dla nie kiedy gdzie na się",
    "tr": "ve bir bu nasıl ne neden benim için ile değil nerede mi mı",  # noqa: RUF001
}


def _languages() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for language, words in _LANGUAGE_WORDS.items():
        for word in words.split():
            found.setdefault(word, []).append(language)
    return {word: tuple(languages) for word, languages in found.items()}


LANGUAGES = _languages()
"""Small words and the languages that have them."""
