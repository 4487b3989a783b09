"""The training text of the embedded models: the lines of corpus.txt, and sentences made from the tables below."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus.txt")

CAPITALS = (
    ("France", "Paris", "a city on the river Seine"),
    ("Italy", "Rome", "a city on the river Tiber"),
    ("Spain", "Madrid", "a city high on a plain"),
    ("Germany", "Berlin", "a city on the river Spree"),
    ("Austria", "Vienna", "a city on the river Danube"),
    ("Hungary", "Budapest", "a city on both sides of the Danube"),
    ("Portugal", "Lisbon", "a city at the mouth of the Tagus"),
    ("England", "London", "a city on the river Thames"),
    ("Ireland", "Dublin", "a city on the river Liffey"),
    ("Poland", "Warsaw", "a city on the river Vistula"),
    ("Serbia", "Belgrade", "a city where the Sava meets the Danube"),
    ("Latvia", "Riga", "a city on the river Daugava"),
    ("Estonia", "Tallinn", "a city by the Baltic Sea"),
    ("Greece", "Athens", "a city with a very old temple"),
    ("Norway", "Oslo", "a city at the end of a long fjord"),
    ("Sweden", "Stockholm", "a city on many islands"),
    ("Denmark", "Copenhagen", "a city full of bicycles"),
    ("Finland", "Helsinki", "a city by the Baltic Sea"),
    ("Iceland", "Reykjavik", "a city that is warmed by hot springs"),
    ("Russia", "Moscow", "a city on the river Moskva"),
    ("Ukraine", "Kyiv", "a city on the river Dnieper"),
    ("Egypt", "Cairo", "a city on the river Nile"),
    ("Kenya", "Nairobi", "a city next to a wildlife park"),
    ("Senegal", "Dakar", "a city at the western tip of Africa"),
    ("Iraq", "Baghdad", "a city on the river Tigris"),
    ("India", "New Delhi", "a city on the river Yamuna"),
    ("China", "Beijing", "a city in the north of the country"),
    ("Japan", "Tokyo", "a city on a wide bay"),
    ("South Korea", "Seoul", "a city on the river Han"),
    ("Vietnam", "Hanoi", "a city on the Red River"),
    ("Thailand", "Bangkok", "a city with many canals"),
    ("Canada", "Ottawa", "a city with a canal to skate on"),
    ("Cuba", "Havana", "a city with an old harbour"),
    ("Peru", "Lima", "a city by the Pacific Ocean"),
    ("Chile", "Santiago", "a city in sight of the Andes"),
    ("Australia", "Canberra", "a city between Sydney and Melbourne"),
)
CAPITAL_FORMS = (
    "The capital of {country} is {city}, {fact}.",
    "What is the capital of {country}? It is {city}, {fact}.",
    "Which city is the capital of {country}? It is {city}, {fact}.",
    "{city} is the capital of {country}.",
    "{city} is in {country}.",
    "{city} is {fact} in {country}.",
    "Where is {city}? {city} is in {country}.",
    "I would like to visit {city}, because {country} is beautiful.",
)

SHOP = (
    (
        "return policy",
        "You can return any item within 30 days, unused and in its box, and we will give you your money back.",
    ),
    ("delivery policy", "We deliver within three days, and delivery is free for orders over 50 euros."),
    ("privacy policy", "We keep your name and your address for the order only, and we never sell them."),
    ("payment policy", "Payment is due when the order leaves our house, by card or by bank transfer."),
    ("repair policy", "Repairs are free in the first year, and later we ask you before we begin."),
    ("gift policy", "Gifts are wrapped by hand, and a card with your own words costs nothing."),
    ("discount policy", "Students and schools pay ten percent less on every order."),
    ("recycling policy", "Bring your old devices to us, and we recycle them for free."),
    ("warranty", "Every new device has a warranty of two years, and every used one has a warranty of one year."),
    ("address", "Our address is 12 Station Road, next to the main station."),
    ("newsletter", "Once a month our newsletter tells you about new devices and old stories."),
    ("price promise", "If you find a lower price within a week, we pay you the difference."),
)
SHOP_FORMS = (
    "What is your {topic}? {answer}",
    "Tell me about your {topic}. {answer}",
    "Please explain your {topic}. {answer}",
    "Can you explain your {topic}? {answer}",
    "Could you tell me your {topic}? {answer}",
    "How does your {topic} work? {answer}",
    "I have a question about your {topic}. {answer}",
    "Where can I read about your {topic}? {answer}",
)

OPPOSITES = (
    "hot cold, big small, fast slow, early late, light dark, full empty, open closed, old new, wet dry, high low, "
    "rich poor, long short, near far, loud quiet, hard soft, first last, clean dirty, heavy light, thick thin, "
    "deep shallow"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday"

HELD_OUT = ("Could you tell me your return policy?", "Paris is the capital of", "What is the capital of France?")
"""Beginnings of documents that are left out of the corpus: the models must infer how they continue."""


def expand(line: str) -> list[str]:
    """All variants of a line with {a|b} alternatives. Identical groups make the same choice."""
    groups = list(dict.fromkeys(re.findall(r"\{[^{}]*\}", line)))
    readings = []
    for choice in itertools.product(*(group[1:-1].split("|") for group in groups)):
        text = line
        for group, chosen in zip(groups, choice, strict=True):
            text = text.replace(group, chosen)
        readings.append(text)
    return readings


def written() -> list[str]:
    """The documents of corpus.txt, without empty lines and lines that begin with #."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    return [text for line in lines if line and not line.startswith("#") for text in expand(line)]


def tabled() -> list[str]:
    """The documents made from the tables of this module."""
    capitals = [
        form.format(country=country, city=city, fact=fact) for country, city, fact in CAPITALS for form in CAPITAL_FORMS
    ]
    shop = [form.format(topic=topic, answer=answer) for topic, answer in SHOP for form in SHOP_FORMS]
    opposites = [f"The opposite of {a} is {b}." for a, b in (pair.split() for pair in OPPOSITES.split(", "))]
    days = [f"The day after {today} is {tomorrow}." for today, tomorrow in itertools.pairwise(DAYS.split())]
    return capitals + shop + opposites + days


def documents() -> list[str]:
    """Every document once, in a fixed order, except those that begin with a held-out text."""
    return [text for text in dict.fromkeys(written() + tabled()) if not text.startswith(HELD_OUT)]
