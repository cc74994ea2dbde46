"""Reads the text of a dataset configuration (TOML or JSON) into plain values; hostile files get a sentence at once."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from backend.errors import UserError

MAX_BYTES = 500_000
MAX_NESTING = 12
MAX_DOTTED = 6

_INTEGER_BITS = 63
# Strings and comments first, so that what is inside them is never taken for structure.
_TOKEN = re.compile(
    # A string that is never closed takes the rest: starting anew at each later quote would take quadratic time.
    r'"""(?:[\s\S]*?"""|[\s\S]*+)'
    r"|'''(?:[\s\S]*?'''|[\s\S]*+)"
    r'|"(?:\\.|[^"\\\n])*+"?'
    r"|'[^'\n]*+'?"
    r"|#[^\n]*+"
    r"|[\[\]{}]"
)
_WORD = r'(?:[\w-]++|"")'
_LONG_KEY = re.compile(rf"(?<![\w-]){_WORD}(?:[ \t]*+\.[ \t]*+{_WORD}){{{MAX_DOTTED},}}")


def is_json(path: str | Path) -> bool:
    """Whether a dataset configuration is JSON: by its suffix, in any letter case."""
    return Path(path).suffix.lower() == ".json"


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a configuration file of at most `limit` bytes.

    Raises:
        UserError: the path holds a NUL, the file is missing, no regular file, unreadable or too large.
    """
    path = Path(path)
    if "\0" in str(path):
        raise UserError("A path may not hold a NUL byte.", "dataset_config")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file. Give a .toml or .json file.", "dataset_config")
        with open(path, "rb") as handle:
            data = handle.read(limit + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be read: {reason}. Check the path.", "dataset_config") from None
    if len(data) > limit:
        raise UserError(
            f"{path} is larger than {limit // 1000} KB. A dataset configuration is a few lines for each folder; "
            "captions belong beside the clips or into a JSONL file.",
            "dataset_config",
        )
    return data


def decode(data: bytes, path: str | Path) -> str:
    """UTF-8 text without a byte order mark (Windows editors write one, TOML has none).

    Raises:
        UserError: the bytes are not UTF-8, or hold a NUL.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.", "dataset_config") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} holds a NUL character in line {line}. Remove it.", "dataset_config")
    return text


def parse_text(text: str, path: str | Path) -> dict[str, Any]:
    """Plain values of the text of `path`: TOML, or JSON when it is named so.

    Raises:
        UserError: the text is malformed, nested too deeply, gives one key twice, or holds a number or a text that no
            setting can have.
    """
    try:
        values = _parse_json(text) if is_json(path) else parse_toml(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        kind = "JSON" if is_json(path) else "TOML"
        raise UserError(f"{os.fspath(path)} is not valid {kind}: {shorten(reason)}.", "dataset_config") from None
    if not isinstance(values, dict):
        raise UserError(f"{os.fspath(path)} must hold an object with a list named datasets.", "dataset_config")
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML after a look at its nesting, since parsers take exponential time or memory on deep keys.

    Raises:
        ValueError: not TOML, or more than `MAX_NESTING` brackets or `MAX_DOTTED` dots deep.
    """
    plain = skeleton(text)
    if found := _LONG_KEY.search(plain):
        raise ValueError(f"the key {shorten(found[0], 40)} has more than {MAX_DOTTED} dots")
    return tomllib.loads(text)


def skeleton(text: str) -> str:
    """TOML with every string emptied and every comment left out, so that only its structure is left.

    Raises:
        ValueError: more than `MAX_NESTING` brackets are open at once.
    """
    depth = 0
    plain: list[str] = []
    position = 0
    for match in _TOKEN.finditer(text):
        plain.append(text[position : match.start()])
        position = match.end()
        token = match[0]
        if token in ("[", "{"):
            depth += 1
            if depth > MAX_NESTING:
                line = text.count("\n", 0, match.start()) + 1
                raise ValueError(f"line {line} is nested more than {MAX_NESTING} levels deep")
        elif token in ("]", "}"):
            depth -= 1
        plain.append(token if len(token) == 1 else "" if token[0] == "#" else '""')
    plain.append(text[position:])
    return "".join(plain)


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"the key {shorten(key, 40)} is given twice")
            table[key] = value
        return table

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a number")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def value_problem(value: Any) -> str | None:
    """Why a value can be no setting (a NUL, half a character, an integer beyond 63 bits), or None. Any nesting."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            if "\0" in item:
                return "holds a NUL character, which no path and no caption can. Remove it."
            if not _encodable(item):
                return "holds half of a character (a lone surrogate), which no file can. Remove it."
        elif isinstance(item, int) and item.bit_length() > _INTEGER_BITS:
            return "is a number with too many digits."
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shorten(value: Any, length: int = 80) -> str:
    """At most `length` printable characters of a value, for a sentence."""
    if isinstance(value, str):
        text = value if value.isprintable() else ascii(value[: length + 1])
    elif isinstance(value, dict):
        text = "a table"
    elif isinstance(value, list):
        text = f"[{', '.join(shorten(item, 20) for item in value[:8])}{', ...' if len(value) > 8 else ''}]"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        text = "a number with too many digits"
    else:
        text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."
