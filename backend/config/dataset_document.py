"""A dataset configuration as a document that is edited: comments, order and unknown tables stay, outside edits too.

Every change is made in the text and then compared with what it should have done, so a file that a TOML library handles
badly is refused instead of damaged. Other trainers read TOML with the package `toml`, which misreads some texts;
what is written here is written such that it reads the same there.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import toml
import tomlkit
from tomlkit.exceptions import TOMLKitError

from backend.config.dataset import DatasetConfig, dataset_config
from backend.config.dataset_text import decode, is_json, parse_text, read_bytes, shorten, skeleton, value_problem
from backend.errors import Problem, UserError
from backend.files import write_atomic

# The parser that keeps comments takes quadratic time, and exponential time on keys with many dots.
MAX_DOCUMENT_BYTES = 24_000
_MAX_DOTTED = 20
_DOTTED = re.compile(r'(?<![\w".-])[A-Za-z_"][\w"-]*+[ \t]*+\.')
_TWICE_DOTTED = re.compile(r'(?<![\w".-])[A-Za-z_"][\w"-]*+(?:[ \t]*+\.[ \t]*+[\w"-]++){3}')
_DATASET_HEADER = re.compile(r"[ \t]*\[\[[ \t]*datasets[ \t]*\]\][ \t]*(?:#.*)?")
_OTHER_HEADER = re.compile(r"[ \t]*\[(?!\[?[ \t]*datasets[ \t]*\.).*\][ \t]*(?:#.*)?")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")

Scalar = str | bool | int | float
Value = Scalar | list[int] | list[str]
Place = int | str


class DatasetDocument:
    """One TOML file that is being edited. A place is the number of a [[datasets]] table (from 0) or "general"."""

    def __init__(self, path: Path, text: str, digest: str | None) -> None:
        self.path = path
        self._digest = digest
        self._text = ""
        self._values: dict[str, Any] = {}
        self.replace_text(text)

    @classmethod
    def open(cls, path: str | Path) -> DatasetDocument:
        """Read a file.

        Raises:
            UserError: the file is missing, JSON, no TOML, larger than 24 KB or nested too deeply.
        """
        path = Path(path)
        if is_json(path):
            raise UserError(f"{path} is JSON, which is not edited here. Save it as TOML.", "dataset_config")
        data = read_bytes(path, MAX_DOCUMENT_BYTES)
        return cls(path, decode(data, path), _digest(data))

    @classmethod
    def new(cls, path: str | Path) -> DatasetDocument:
        """Begin a file that does not exist yet; `save` refuses when it does by then."""
        if Path(path).suffix.lower() != ".toml":
            raise UserError(f"{path} must end with .toml.", "dataset_config")
        return cls(Path(path), "", None)

    @property
    def text(self) -> str:
        """The document as it would be saved."""
        return self._text

    @property
    def values(self) -> dict[str, Any]:
        """A copy of all values as plain ones."""
        return copy.deepcopy(self._values)

    @property
    def datasets(self) -> list[dict[str, Any]]:
        """A copy of the [[datasets]] tables as plain values."""
        tables = self._values.get("datasets", [])
        return copy.deepcopy([table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else [])

    @property
    def general(self) -> dict[str, Any]:
        """A copy of the [general] table as plain values, empty when there is none."""
        table = self._values.get("general", {})
        return copy.deepcopy(table) if isinstance(table, dict) else {}

    def config(self) -> DatasetConfig:
        """The configuration that the document makes.

        Raises:
            Problems: as `load_dataset_config`.
        """
        return dataset_config(self._values)

    def replace_text(self, text: str) -> None:
        """Take a whole new text, as the page's text field gives it.

        Raises:
            UserError: it is no TOML, too long or nested too deeply; the document then stays as it was.
        """
        text = decode(text.encode("utf-8", "surrogatepass"), self.path)
        values = parse_text(text, self.path)
        if len(text.encode("utf-8")) > MAX_DOCUMENT_BYTES:
            raise UserError(
                f"{self.path} is too long to be edited here: at most {MAX_DOCUMENT_BYTES // 1000} KB. "
                "Edit it with a text editor, or split it.",
                "dataset_config",
            )
        plain = skeleton(text)
        if len(_DOTTED.findall(plain)) > _MAX_DOTTED or _TWICE_DOTTED.search(plain):
            raise UserError(
                f"{self.path} has more dotted keys than can be edited here: at most {_MAX_DOTTED} of two dots each. "
                "Write tables, or edit it with a text editor.",
                "dataset_config",
            )
        self._text, self._values = text, values

    # --- changes --------------------------------------------------------------------------------------------------

    def set(self, place: Place, key: str, value: Value) -> None:
        """Give a key of a table a value; a missing [general] table is made.

        Raises:
            UserError: there is no such table, or the value cannot be written.
        """
        self._check_key(key, value)
        wanted = self.values
        if place == "general":
            table = wanted.setdefault("general", {})
        else:
            table = wanted["datasets"][self._index(place)]
        if not isinstance(table, dict):
            raise UserError("[general] is not a table in this file. Correct its text.", "general")
        known = key in table
        if known and table[key] == value and type(table[key]) is type(value):
            return
        table[key] = copy.deepcopy(value)
        line = f"{key} = {_value_text(value)}"
        ways: list[Callable[[], str]] = [lambda: self._assigned(place, key, line)]
        if not known:
            ways.insert(0, lambda: self._with_line(place, line))
        self._change(wanted, ways)

    def remove(self, place: Place, key: str) -> None:
        """Remove a key of a table with the comment in its line; nothing happens when it is not there.

        Raises:
            UserError: there is no such table.
        """
        wanted = self.values
        table = wanted.get("general", {}) if place == "general" else wanted["datasets"][self._index(place)]
        if not isinstance(table, dict) or key not in table:
            return
        del table[key]

        def removed() -> str:
            document, target = self._target(place)
            target.remove(key)
            return tomlkit.dumps(document)

        self._change(wanted, [removed])

    def add_dataset(self, values: Mapping[str, Value]) -> int:
        """Add a [[datasets]] table at the end of the file and return its number.

        Raises:
            UserError: a value cannot be written, or `datasets` is not a list of tables.
        """
        for key, value in values.items():
            self._check_key(key, value)
        wanted = self.values
        tables = wanted.setdefault("datasets", [])
        if not isinstance(tables, list):
            raise UserError("datasets is not a list of tables in this file. Correct its text.", "datasets")
        tables.append(copy.deepcopy(dict(values)))
        lines = [f"{key} = {_value_text(value)}" for key, value in values.items()]
        newline = _newline(self._text)

        def at_end() -> str:
            before = self._text.rstrip("\r\n")
            block = newline.join(["[[datasets]]", *lines]) + newline
            return f"{before}{newline}{newline}{block}" if before else block

        def into_list() -> str:
            document: Any = tomlkit.parse(self._text)
            document["datasets"].append(tomlkit.parse(f"a = {{{', '.join(lines)}}}")["a"])
            return tomlkit.dumps(document)

        self._change(wanted, [at_end, into_list])
        return len(tables) - 1

    def remove_dataset(self, index: int) -> None:
        """Remove a [[datasets]] table; comments directly above the next table stay with that one.

        Raises:
            UserError: there is no such table.
        """
        wanted = self.values
        del wanted["datasets"][self._index(index)]
        emptied = copy.deepcopy(wanted)
        if not emptied["datasets"]:
            del emptied["datasets"]

        def by_lines() -> str:
            lines = self._text.splitlines(keepends=True)
            start, end = self._span(lines, index)
            return "".join(lines[:start] + lines[end:])

        def by_library() -> str:
            document: Any = tomlkit.parse(self._text)
            del document["datasets"][index]
            return tomlkit.dumps(document)

        self._change(wanted, [by_lines, by_library], emptied)

    # --- saving ---------------------------------------------------------------------------------------------------

    def changed_outside(self) -> bool:
        """Whether the file is not what it was when it was opened or saved last (also: removed, or made meanwhile)."""
        return _digest_of(self.path) != self._digest

    def save(self) -> list[Problem]:
        """Write the file atomically; returns notices about what other trainers would read differently.

        Raises:
            UserError: the file changed outside meanwhile, or cannot be written.
        """
        if self.changed_outside():
            raise UserError(
                f"{self.path} was changed by another program since it was opened here. Open it again; "
                "nothing was written.",
                "dataset_config",
            )
        data = self._text.encode("utf-8")
        write_atomic(self.path, data)
        self._digest = _digest(data)
        return self.notices()

    def notices(self) -> list[Problem]:
        """What the TOML reader of other trainers would read differently from this document."""
        try:
            other = toml.loads(self._text)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = shorten(str(error))
            return [Problem("dataset_config", f"cannot be read by trainers that use the package toml 0.10: {reason}.")]
        return [
            Problem(where, "reads differently in trainers that use the package toml 0.10. Write it more simply.")
            for where in _differences(self._values, other)
        ]

    # --- the text -------------------------------------------------------------------------------------------------

    def _index(self, place: Place) -> int:
        count = len(self.datasets)
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < count:
            raise UserError(f"There is no dataset {shorten(place)}: the file has {count}, counted from 0.", "datasets")
        return place

    def _check_key(self, key: str, value: Value) -> None:
        if not _BARE_KEY.fullmatch(key):
            raise UserError(f"{shorten(key)} is not a key: letters, digits, _ and - only.", "dataset_config")
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, Scalar) for item in items) or any(item != item for item in items):
            raise UserError(f"{shorten(value)} cannot be written as a setting.", key)
        trouble = value_problem(value)
        if trouble:
            raise UserError(trouble, key)

    def _change(
        self, wanted: dict[str, Any], ways: list[Callable[[], str]], also: dict[str, Any] | None = None
    ) -> None:
        """Take the first way that gives exactly the wanted values; else leave the document as it was."""
        before = self._text, self._values
        trouble = "the change would alter something else"
        for way in ways:
            try:
                self.replace_text(way())
            except UserError as error:
                trouble = error.message
            except (TOMLKitError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
                pass
            else:
                if _same(self._values, wanted) or (also is not None and _same(self._values, also)):
                    return
            self._text, self._values = before
        raise UserError(f"{self.path} cannot be edited here: {trouble}. Edit its text.", "dataset_config")

    def _target(self, place: Place) -> tuple[tomlkit.TOMLDocument, Any]:
        document: Any = tomlkit.parse(self._text)
        return document, document["general"] if place == "general" else document["datasets"][place]

    def _assigned(self, place: Place, key: str, line: str) -> str:
        document, target = self._target(place)
        target[key] = tomlkit.parse(line + "\n")[key]
        return tomlkit.dumps(document)

    def _with_line(self, place: Place, line: str) -> str:
        """The text with a new line after the last line of a table that holds something."""
        lines = self._text.splitlines(keepends=True)
        newline = _newline(self._text)
        if place == "general" and "general" not in self._values:
            first = next((n for n, text in enumerate(lines) if text.lstrip().startswith("[")), len(lines))
            lines[first:first] = [f"[general]{newline}", f"{line}{newline}", newline]
            return "".join(lines)
        start, end = self._span(lines, place)
        last = max(n for n in range(start, end) if n == start or _holds_something(lines[n]))
        sub_tables = [n for n in range(start + 1, end) if lines[n].lstrip().startswith("[") and "]" in lines[n]]
        last = min([last, *(max(start, n - 1) for n in sub_tables if "datasets" in lines[n] or "general" in lines[n])])
        if not lines[last].endswith(("\n", "\r")):
            lines[last] += newline
        lines.insert(last + 1, f"{line}{newline}")
        return "".join(lines)

    def _span(self, lines: list[str], place: Place) -> tuple[int, int]:
        """First line of a table and one past its last, without the comments directly above what follows."""
        headers = [n for n, text in enumerate(lines) if _OTHER_HEADER.fullmatch(text.rstrip("\r\n"))]
        if place == "general":
            start = next(n for n in headers if re.match(r"[ \t]*\[[ \t]*general[ \t]*\]", lines[n]))
        else:
            own = [n for n in headers if _DATASET_HEADER.fullmatch(lines[n].rstrip("\r\n"))]
            if len(own) != len(self.datasets):
                raise ValueError("The tables are not under headers of their own.")
            start = own[int(place)]
        end = next((n for n in headers if n > start), len(lines))
        above = end
        while end < len(lines) and above - 1 > start and lines[above - 1].lstrip().startswith("#"):
            above -= 1
        # Comments that follow the last key without an empty line belong to that key's table.
        return start, above if above - 1 > start and not lines[above - 1].strip() else end


def _holds_something(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    try:
        return _digest(path.read_bytes())
    except OSError:
        return ""  # Something is there that cannot be read: surely not what was opened.


def _same(one: Any, other: Any) -> bool:
    """Equal in type too: 1, 1.0 and true are three values. NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other or (one != one and other != other)


def _differences(ours: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in (*ours, *(key for key in other if key not in ours)):
        if key == "datasets" and isinstance(ours.get(key), list) and isinstance(other.get(key), list):
            mine, theirs = ours[key], other[key]
            if len(mine) != len(theirs):
                found.append("datasets")
                continue
            for index, (table, copied) in enumerate(zip(mine, theirs, strict=True)):
                if isinstance(table, dict) and isinstance(copied, dict):
                    names = [name for name in (*table, *copied) if not _alike(table.get(name), copied.get(name))]
                    found += [f"datasets[{index}].{shorten(name, 60)}" for name in dict.fromkeys(names)]
        elif not _alike(ours.get(key), other.get(key)):
            found.append(shorten(key, 60))
    return found


def _alike(ours: Any, other: Any) -> bool:
    # The other reader makes subclasses of dict for inline tables and mixes no types in lists; values decide.
    if isinstance(ours, dict) and isinstance(other, dict):
        return ours.keys() == other.keys() and all(_alike(ours[key], other[key]) for key in ours)
    if isinstance(ours, list) and isinstance(other, list):
        return len(ours) == len(other) and all(map(_alike, ours, other))
    return _same(ours, other)


# --- values -------------------------------------------------------------------------------------------------------


def _value_text(value: Value, listed: bool = False) -> str:
    """TOML of a value in the first form that both readers read back equal, by itself or between others in a list."""
    if isinstance(value, list):
        return f"[{', '.join(_value_text(item, True) for item in value)}]"
    if not isinstance(value, str):
        return tomlkit.item(value).as_string()
    plain = tomlkit.item(value).as_string()
    forms = (
        plain,
        f"'{value}'",
        f'"{_escaped(value)}"',
        f'"""{_escaped(value)}"""',
        '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"',
    )
    # None fits a few texts of control characters and backslashes; `notices` then tells.
    return next((form for form in forms if _reads_back(form, value, listed)), plain)


def _escaped(value: str) -> str:
    return "".join(
        letter
        if (letter.isascii() and letter.isalnum()) or letter in " -_/:(),"
        else f"\\u{ord(letter):04x}"
        if ord(letter) < 0x10000
        else f"\\U{ord(letter):08x}"
        for letter in value
    )


def _reads_back(form: str, value: str, listed: bool) -> bool:
    text = f'a = [{form}, "x", {form}]\nb = 1\n' if listed else f"a = {form}\nb = 1\n"
    wanted = {"a": [value, "x", value] if listed else value, "b": 1}
    try:
        return tomllib.loads(text) == wanted == toml.loads(text)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
