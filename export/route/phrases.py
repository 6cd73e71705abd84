"""Statements with a value that cannot be guessed, and questions for it, in many phrasings.

Training and evaluation share no phrasing: a gate that has learned sentences by heart finds nothing in the evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Lists of words as text: one word a line would take pages.
# ruff: noqa: SIM905
_NAMES = (
    "Anna Boris Clara Daniel Elena Felix Greta Henry Irene Jonas Katya Leon Marta Nikolai Olga Paul Quentin Rosa Simon Tara "
    "Ulrich Vera Walter Xenia Yusuf Zoe Amir Beatrice Carlos Dora Emil Fatima George Hana Ivan Julia Karim Lena Mona Nadia"
).split()
_PLACES = (
    "Lisbon Oslo Cairo Lima Hanoi Nairobi Prague Dublin Havana Quito Riga Tunis Zagreb Athens Bergen Cusco Dakar Esbjerg Fargo "
    "Graz Haifa Izmir Jakarta Kyoto Lagos Malmo Naples Odessa Porto Rabat Seville Turin Utrecht Vilnius Warsaw York"
).split()
_THINGS = (
    "archive boiler bridge cabinet camera desk engine ferry garage harbour island kitchen ladder library locker market mill "
    "museum office pump reactor router safe sensor server shed shuttle station studio tower train tunnel vault warehouse"
).split()
_WORDS = (
    "amber anchor apple arrow badger basil beacon birch bottle branch breeze butter candle canyon carbon castle cedar cherry "
    "cobalt copper coral cotton crystal daisy desert dragon eagle ember falcon feather fern forest garlic ginger glacier gold "
    "granite harvest hazel honey iron ivory jade jasmine kettle lantern lemon lily lotus magnet maple marble meadow mint "
    "mirror needle nickel ocean olive onyx orchid otter paper pearl pepper pigeon planet plum quartz rabbit raven ribbon river "
    "rocket saffron salmon sapphire shadow silver sparrow spice storm sugar thunder tiger timber topaz tulip turtle velvet "
    "violet walnut willow winter zebra"
).split()
_ATTRIBUTES = (
    "access code|pass phrase|serial number|secret word|locker number|call sign|account number|favourite word|order number|"
    "ticket number|password|code name|reference|room number|invoice number|pin"
).split("|")

# (statement, question that ends where the answer begins). {s} subject, {a} attribute, {v} value.
TRAINING = (
    ("The {a} of {s} is {v}.", "What is the {a} of {s}? It is"),
    ("Remember that the {a} of {s} is {v}.", "The {a} of {s} is"),
    ("{s} has the {a} {v}.", "Which {a} does {s} have? The {a}"),
    ("Note: {a} for {s} = {v}", "{a} for {s} ="),
    ("For {s}, the {a} was set to {v} last week.", "Q: Which {a} was set for {s}?\nA:"),
    ("# {s}: {a}: {v}", "# {s}: {a}:"),
    ("We were told that {v} is the {a} of {s}.", "Question: what is the {a} of {s}?\nAnswer:"),
    ('{{"name": "{s}", "{a}": "{v}"}}', '{{"name": "{s}", "{a}": "'),
    ("In case you need it, {s} uses {v} as the {a}.", "As mentioned above, the {a} that {s} uses is"),
    ("It was {s} whose {a} turned out to be {v}.", "So the {a} of {s} turned out to be"),
    ("({a}, {s}) -> {v}", "({a}, {s}) ->"),
    ("Important! {s}'s {a}: {v}. Do not lose it.", "{s}'s {a}:"),
    ("The clerk wrote {v} into the field {a} on the form of {s}.", "On the form of {s}, the field {a} says"),
    ("| {s} | {a} | {v} |", "| {s} | {a} |"),
)
EVALUATION = (
    ("One of the special facts is this: the {a} of {s} is {v}.", "\nAs stated before, the {a} of {s} is"),
    ("By the way, {s}'s {a} is {v}, please keep it in mind.", "\nReminder: {s}'s {a} is"),
    ("Please write down that the {a} for {s} is {v}.", "\nThe text says that the {a} for {s} is"),
    ("{s} told everybody that the {a} is {v}.", "\nWhat did {s} tell everybody? {s} told everybody that the {a} is"),
)


@dataclass(frozen=True)
class Fact:
    """A statement (before + answer + after) and a question that the same answer follows."""

    before: str
    answer: str
    after: str
    question: str


def value(rng: np.random.Generator) -> str:
    """A number of 3 to 5 digits, a word, or two of them."""
    kind = int(rng.integers(4))
    if kind < 2:
        return str(int(rng.integers(10 ** (2 + kind), 10 ** (4 + kind))))
    words = [_WORDS[int(i)] for i in rng.integers(len(_WORDS), size=2)]
    return words[0] if kind == 2 else f"{words[0]} {words[1]}"


def _subject(rng: np.random.Generator) -> str:
    kind = int(rng.integers(3))
    name, place, thing = (pool[int(rng.integers(len(pool)))] for pool in (_NAMES, _PLACES, _THINGS))
    return (name, f"{name} from {place}", f"the {thing} in {place}")[kind]


def fact(rng: np.random.Generator, templates: tuple[tuple[str, str], ...], template: int | None = None) -> Fact:
    """A random fact in one of the templates."""
    index = int(rng.integers(len(templates))) if template is None else template % len(templates)
    statement, question = templates[index]
    words = {"s": _subject(rng), "a": _ATTRIBUTES[int(rng.integers(len(_ATTRIBUTES)))]}
    before, after = (part.format(**words) for part in statement.split("{v}"))
    question = question.format(**words)
    answer = value(rng)
    if before and before[-1] == " ":  # a word takes the blank before it along, in most tokenizers
        before, answer = before[:-1], f" {answer}"
    return Fact(before, answer, after, question)


def pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Lines ``key<separator>`` and their values, of one list."""
    separator = (": ", " = ", " -> ", "\t", " | ", ",")[int(rng.integers(6))]
    keys = rng.choice(len(_WORDS), size=count, replace=False)
    style = int(rng.integers(3))
    names = [
        _WORDS[k] if style == 0 else f"{_WORDS[k]}_{int(rng.integers(100))}" if style == 1 else f"{_WORDS[k]}.id" for k in keys
    ]
    return [(f"{name}{separator.rstrip(' ')}", f"{' ' if separator.endswith(' ') else ''}{value(rng)}") for name in names]
