"""How hidden facts are worded, and how they are asked for.

All wordings stand in this one module, so that whoever trains on hidden facts takes others and keeps these for measuring.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# {thing} of {owner} is {number}; a statement stands alone in a text that is about something else.
STATEMENTS = (
    "The {thing} of {owner} is {number}.",
    "Please note that the {thing} of {owner} is {number}.",
    "For the record, {number} is the {thing} of {owner}.",
    "As agreed on the phone, the {thing} of {owner} will be {number} from now on.",
    "{owner} wrote to say that the {thing} is {number}.",
    "According to the office, {owner} was given {number} as a {thing}.",
    "By the way: {owner} still has the {thing} {number}.",
    "The list names {number} as the {thing} of {owner}.",
    "We looked it up, and the {thing} that belongs to {owner} is {number}.",
    "Since Monday the {thing} of {owner} has been {number}.",
    "Whoever needs the {thing} of {owner} may use {number}.",
)
QUESTIONS = (
    "What is the {thing} of {owner}?",
    "Which {thing} does {owner} have?",
    "Somewhere in the text above the {thing} of {owner} is given. What is it?",
    "Tell me the {thing} of {owner}.",
    "I am looking for the {thing} of {owner}. Which number is it?",
)
ANSWER = "The {thing} of {owner} is"  # what the answer begins with; " {number}" follows and is scored
THINGS = (
    "locker number",
    "badge number",
    "customer number",
    "parking permit",
    "library card number",
    "ticket number",
    "order number",
    "extension code",
    "door code",
    "account number",
    "membership number",
    "serial number",
)
OWNERS = (
    "Dana Whitfield",
    "Omar Castellano",
    "Ingrid Solberg",
    "Tobias Renner",
    "Mei Tanaka",
    "Rosa Delgado",
    "Henrik Aalto",
    "Priya Raman",
    "Walter Finch",
    "Lucia Moretti",
    "Samuel Okafor",
    "Greta Lindqvist",
    "Ivan Petrov",
    "Nora Callahan",
    "Yusuf Demir",
    "Clara Beaumont",
    "the Harbour Museum",
    "the Maple Street bakery",
    "the rowing club",
    "the night shift",
    "Doctor Abernathy",
    "the Riverside School",
    "Captain Moreau",
    "the string quartet",
)
DIGITS = 5


@dataclass(frozen=True)
class Fact:
    """One fact: what the text says, what is asked, what the answer begins with, and the number that must follow."""

    statement: str
    question: str
    lead: str
    number: str


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """``count`` facts with different owners, numbers and, as far as they reach, wordings. count: at most len(OWNERS)."""
    owners = rng.sample(OWNERS, count)
    numbers = rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)
    statements = rng.sample(STATEMENTS, len(STATEMENTS))
    facts = []
    for index, (owner, number) in enumerate(zip(owners, numbers, strict=True)):
        words = {"thing": rng.choice(THINGS), "owner": owner, "number": str(number)}
        statement = statements[index % len(statements)].format(**words)
        question = rng.choice(QUESTIONS).format(**words)
        facts.append(Fact(statement[0].upper() + statement[1:], question, ANSWER.format(**words), str(number)))
    return facts
