"""Find and replace in many captions. Patterns run in a process of their own that is ended when it takes too long.

A pattern such as (a+)+b can take longer than the age of the universe on a short text, and Python cannot interrupt it.
Run as `python -m k5ui.datasets.replacing`: a request as JSON on stdin, {"texts"} or {"error"} on stdout.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backend.errors import UserError

MAX_PATTERN = 1000
MAX_TEXT = 20_000
MAX_RESULT = 1 << 20
SECONDS = 6.0
_SURELY_FITS = 50_000_000


@dataclass(frozen=True)
class Replacement:
    """What is done to each text: `find` (a pattern if `regex`) becomes `replace`, then `prefix` and `suffix` are put
    around it; a text that already begins (ends) with them does not get them twice."""

    find: str = ""
    replace: str = ""
    regex: bool = False
    prefix: str = ""
    suffix: str = ""

    def check(self) -> None:
        """Say what is wrong with it.

        Raises:
            UserError: nothing to do, a text that is too long, or a pattern that is none.
        """
        if not (self.find or self.prefix or self.suffix):
            raise UserError("Say what to find, or what to put before or behind the captions.", "find")
        longest = max(len(self.replace), len(self.prefix), len(self.suffix), 0 if self.regex else len(self.find))
        if longest > MAX_TEXT or (self.regex and len(self.find) > MAX_PATTERN):
            raise UserError(f"The text is too long: at most {MAX_TEXT} letters, {MAX_PATTERN} for a pattern.", "find")

    def around(self, text: str) -> str:
        """The text with prefix and suffix."""
        text = text if text.startswith(self.prefix) else self.prefix + text
        return text if text.endswith(self.suffix) else text + self.suffix


def replace_texts(texts: Sequence[str], how: Replacement, environment: dict[str, str]) -> list[str]:
    """The texts after the replacement, in their order. `environment` is that of a process which can import this module.

    Raises:
        UserError: the pattern is wrong or takes longer than 6 seconds, or a result would be longer than 1 MB.
    """
    how.check()
    if not how.find:
        found = list(texts)
    elif not how.regex:
        found = [text.replace(how.find, how.replace) if _fits(text, how) else None for text in texts]
    else:
        found = _replace_by_pattern(texts, how, environment)
    if None in found:
        raise UserError("A caption would become longer than 1 MB. Choose another replacement.", "replace")
    return [how.around(text) for text in found if text is not None]


def _fits(text: str, how: Replacement) -> bool:
    growth = len(how.replace) - len(how.find)
    return growth <= 0 or len(text) + text.count(how.find) * growth <= MAX_RESULT


def _replace_by_pattern(texts: Sequence[str], how: Replacement, environment: dict[str, str]) -> list[str | None]:
    request = json.dumps({"texts": list(texts), "how": asdict(how)}).encode("ascii")
    command = [sys.executable, "-m", "k5ui.datasets.replacing"]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"The pattern takes longer than {SECONDS:g} seconds. Write it without repeats inside of repeats, "
            "or change fewer captions at once.",
            "find",
        ) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise UserError("The pattern made the search end. Write it in another way.", "find") from None
    if "error" in answer:
        raise UserError(answer["error"], "find")
    return answer["texts"]


class _TooLong(Exception):
    """A result is longer than a caption may be."""


def _substitute(pattern: re.Pattern[str], template: str, text: str) -> str | None:
    # At most this long: a match at every letter, each reference in the template as long as the whole text.
    if (len(text) + 1) * (len(template) + template.count("\\") * len(text) + 1) <= _SURELY_FITS:
        found = pattern.sub(template, text)
        return found if len(found) <= MAX_RESULT else None
    size = len(text)

    def expanded(match: re.Match[str]) -> str:
        nonlocal size
        new = match.expand(template)
        size += len(new)
        if size > 2 * MAX_RESULT:
            raise _TooLong
        return new

    try:
        found = pattern.sub(expanded, text)
    except _TooLong:
        return None
    return found if len(found) <= MAX_RESULT else None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do a request: {"texts", "how"} gives {"texts"} (None for one that became too long) or {"error": sentence}."""
    how = Replacement(**request["how"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pattern = re.compile(how.find)
        return {"texts": [_substitute(pattern, how.replace, text) for text in request["texts"]]}
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        return {"error": f"The pattern cannot be used: {error}."}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))))
