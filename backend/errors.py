"""The error family: a person's mistakes exit with 2 and one sentence each, engine faults with 1 and their phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the option it belongs to (None: to the request as a whole)."""

    field: str | None
    message: str

    def __str__(self) -> str:
        if not self.field:
            return self.message
        # Options are plain names; places inside a file look like datasets[0].resolution.
        return f"--{self.field}: {self.message}" if self.field.isidentifier() else f"{self.field}: {self.message}"


class K5Error(Exception):
    """Something that the project itself reports; never shown with a traceback."""

    exit_code = 1


class Problems(K5Error):
    """Everything that is wrong with a request, reported together."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("Problems needs at least one problem.")
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UserError(Problems):
    """One mistake of the person who asked: what, where, what to do."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__([Problem(field, message)])
        self.message = message
        self.field = field


class EngineError(K5Error):
    """A fault of the engine in one of its phases (load, text, vae, denoise, decode, train, save)."""

    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.message = message
        self.phase = phase


class Stopped(K5Error):
    """Somebody asked the engine to stop, and it did so between two steps; `facts` go into the journal's record."""

    exit_code = 0

    def __init__(self, message: str, **facts: int | str) -> None:
        super().__init__(message)
        self.facts = facts
