"""Takes pasted scripts apart: shell, batch and PowerShell text, lines joined, variables filled in, words split.

Nothing is run. What cannot be known (a variable that the text does not set) stays as it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_WINDOWS_MARKS = (
    re.compile(r"\^[ \t]*$", re.MULTILINE),
    re.compile(r"%[A-Za-z_]\w*%"),
    re.compile(r"(?:^|[\s\"'=])[A-Za-z]:\\"),
    re.compile(r"^\s*(?:@echo|rem\b|set\s+\w+=|call\b|::)", re.MULTILINE | re.IGNORECASE),
    re.compile(r"`[ \t]*$", re.MULTILINE),
)
_COMMENT = re.compile(r"^\s*(?:#|::|@?rem\b|@echo\b)", re.IGNORECASE)
_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\n[ \t]*")
_ASSIGNMENT = re.compile(
    r"^\s*(?:(?:export|set)\s+|\$(?:env:)?)?(?P<quote>\"?)(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*)$", re.IGNORECASE
)
_VARIABLE = re.compile(r"%([A-Za-z_]\w*)%|\$(?:env:)?\{?([A-Za-z_]\w*)\}?")
_SEPARATORS = ("&&", "||", ";", "&", "|")


@dataclass(frozen=True)
class Command:
    """One command of a script: its words."""

    words: tuple[str, ...]

    def index_of(self, part: str) -> int | None:
        """The place of the first word that is the name or the module of a program with `part` in its name."""
        for index, word in enumerate(self.words):
            if part in word.replace("\\", "/").rpartition("/")[2] and not word.startswith("--"):
                return index
        return None


def commands(text: str) -> list[Command]:
    """The commands of a script in their order, without assignments and comments.

    Raises:
        ValueError: a quotation mark is never closed.
    """
    windows = any(mark.search(text) for mark in _WINDOWS_MARKS)
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if not _COMMENT.match(line)]
    variables: dict[str, str] = {}
    found: list[Command] = []
    for line in _CONTINUED.sub(" ", "\n".join(lines)).split("\n"):
        assignment = _ASSIGNMENT.match(line)
        if assignment:
            value = _filled(assignment["value"].strip(), variables)
            whole = value.removesuffix('"') if assignment["quote"] else value
            words = [whole] if assignment["quote"] else _split(whole, windows)
            if len(words) <= 1 or line.lstrip().lower().startswith("set "):
                variables[assignment["name"].upper()] = words[0] if len(words) == 1 else whole
                continue
        found += _parts(_split(_filled(line, variables), windows))
    return found


def _filled(text: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get((match[1] or match[2]).upper(), match[0]), text)


def _split(line: str, windows: bool) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = "" if windows else "#"
    if windows:
        lexer.escape = ""
    return list(lexer)


def _parts(words: list[str]) -> Iterator[Command]:
    part: list[str] = []
    for word in [*words, _SEPARATORS[0]]:
        if word in _SEPARATORS:
            if part:
                yield Command(tuple(part))
            part = []
        else:
            part.append(word)
