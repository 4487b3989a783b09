"""The errors that a user can mend: one line with the fact, its numbers and a hint."""


class UserError(Exception):
    """Something the user can fix; printed as one line, exit code 2."""

    def __init__(self, fact: str, hint: str = "") -> None:
        super().__init__(fact, hint)
        self.fact = fact
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.fact} HINT: {self.hint}" if self.hint else self.fact
        return " ".join(text.split())


class PlanError(UserError):
    """The model cannot be cut as asked, or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not match its model."""


class WorldError(UserError):
    """The environment of the process contradicts itself or the configuration."""
