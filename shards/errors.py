"""Errors that a user can fix: one line with the fact, its numbers and a hint."""

MAX_FACT_CHARACTERS = 1000


class UserError(Exception):
    """Something the user can fix; printed as one line, exit code 2.

    The fact may quote a file: it is shortened, and unprintable characters, which could move a terminal's cursor, are
    replaced.
    """

    def __init__(self, fact: str, hint: str = "") -> None:
        super().__init__(fact, hint)
        self.fact = fact
        self.hint = hint.removesuffix(".")

    def __str__(self) -> str:
        fact = "".join(letter if letter.isprintable() else "?" for letter in " ".join(self.fact.split()))
        if len(fact) > MAX_FACT_CHARACTERS:
            fact = f"{fact[:MAX_FACT_CHARACTERS]} ..."
        if self.hint:
            return f"{fact} HINT: {' '.join(self.hint.split())}"
        return fact


class PlanError(UserError):
    """The model cannot be cut as asked, or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not match its model."""


class WorldError(UserError):
    """The environment of the process contradicts itself or the configuration."""
