"""Reads a training command of musubi-tuner or of ours, or a TOML file of options, into the values of the form.

What was not understood, what means something else here, and what was left out is said in notes; nothing is dropped
silently. What the flags of musubi-tuner do is in its documentation; where its own code does something else with this
model (timestep_sampling sigma, weighting schemes that only choose timesteps), the notes follow the code.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backend.config.options import OptionSpec, did_you_mean
from backend.errors import UserError
from k5ui.text.loader import Texts
from k5ui.training import foreign_options
from k5ui.training.command_words import Command, commands
from k5ui.training.fields import SPECS
from k5ui.training.request import fitting

MAX_TEXT = 200_000
_LAUNCHER_VALUES = ("mixed_precision", "num_processes")
_OURS = "backend.kandinsky5_train_network"
_TRAINER = "train_network"


@dataclass(frozen=True)
class Note:
    """Something to know about an import: the flag, how it was taken ("unknown", "changed", "left_out"), a sentence."""

    name: str
    kind: str
    text: str


@dataclass
class Imported:
    """What a text says: values by option name, and notes."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


@dataclass
class Flags:
    """The flags of a command by name as they were written: values, True for a switch, all of them in order."""

    given: dict[str, Any] = field(default_factory=dict)
    stray: list[str] = field(default_factory=list)


def import_text(text: str, texts: Texts) -> Imported:
    """Read a command, a script with one, or TOML.

    Raises:
        UserError: there is no training in it.
    """
    if len(text) > MAX_TEXT:
        raise UserError(texts("train.import.too_long"))
    table = _toml(text)
    if table is not None:
        return _Importer(texts).run(Flags(table), foreign=False)
    command, others = _training(text, texts)
    importer = _Importer(texts)
    for other in others:
        importer.note("", "left_out", "other_command", what=" ".join(other.words)[:80])
    place = command.index_of(_TRAINER)
    launcher, rest = _flags(command.words[: place or 0]), _flags(command.words[(place or -1) + 1 :])
    program = command.words[place] if place is not None else ""
    importer.launcher(launcher, rest)
    kandinsky = "kandinsky5" in program or place is None
    if not kandinsky:
        importer.note("", "changed", "other_model", what=program[-80:])
    return importer.run(rest, foreign=place is not None and _OURS not in program.replace("/", "."))


def _toml(text: str) -> dict[str, Any] | None:
    """The flat table of a TOML text; None: it is none."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError):
        return None
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat or None


def _training(text: str, texts: Texts) -> tuple[Command, list[Command]]:
    try:
        found = commands(text)
    except ValueError:
        raise UserError(texts("train.import.quotes")) from None
    trainers = [command for command in found if command.index_of(_TRAINER) is not None]
    loose = [command for command in found if any(word.startswith("--") for word in command.words)]
    chosen = next(iter(trainers), None) or next(iter(loose), None)
    if chosen is None:
        raise UserError(texts("train.import.nothing"))
    return chosen, [command for command in loose if command is not chosen]


def _flags(words: Sequence[str]) -> Flags:
    """`--name value ...`, `--name=value` and switches; values of a flag that is given twice are put together."""
    flags = Flags()
    name: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, separator, value = word[2:].partition("=")
            if separator:
                _add(flags, name, value)
                name = None
            elif name not in flags.given:
                flags.given[name] = True
        elif name is not None:
            _add(flags, name, word)
        else:
            flags.stray.append(word)
    return flags


def _add(flags: Flags, name: str, value: str) -> None:
    known = flags.given.get(name)
    flags.given[name] = [*known, value] if isinstance(known, list) else [value]


class _Importer:
    """Takes flags one after the other and keeps notes."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self.found = Imported()

    def note(self, name: str, kind: str, text: str, **values: object) -> None:
        """Add a note; `text` is the ending of its key."""
        self.found.notes.append(Note(name, kind, self._texts(f"train.import.{text}", **values)))

    def launcher(self, flags: Flags, own: Flags) -> None:
        """Flags of `accelerate launch`: the number format counts for training too, processes are its own business."""
        precision = flags.given.get("mixed_precision")
        if isinstance(precision, list) and "mixed_precision" not in own.given:
            own.given["mixed_precision"] = precision
        processes = flags.given.get("num_processes")
        if (isinstance(processes, list) and processes[-1] != "1") or "multi_gpu" in flags.given:
            self.note("num_processes", "left_out", "processes")

    def run(self, flags: Flags, foreign: bool) -> Imported:
        """All flags; with `foreign` also what musubi-tuner does where its command says nothing."""
        given = dict(flags.given)
        for word in flags.stray:
            self.note(word[:80], "unknown", "stray")
        for rule in foreign_options.RULES:
            for note in rule(given, foreign):
                self.note(note.name, note.kind, note.text, **note.values)
        for name, value in given.items():
            self._take(name, value)
        return self.found

    def _take(self, name: str, value: Any) -> None:
        spec, fixed = _option(name)
        if spec is None:
            reason = foreign_options.LEFT_OUT.get(name)
            if reason is not None:
                self.note(name, "left_out", reason)
            else:
                suggestion = did_you_mean(name, SPECS)
                self.found.notes.append(Note(name, "unknown", self._texts("train.import.unknown") + suggestion))
            return
        if fixed is not None:
            value = fixed if _is_on(value) else None
        try:
            value = _value(spec, value)
        except ValueError:
            self.note(name, "unknown", "no_value", value=str(value)[:80])
            return
        if value is not None:
            self.found.values[spec.name] = value
            if any("$" in item or "%" in item for item in _paths_of(spec, value)):
                self.note(name, "changed", "variable")


def _option(name: str) -> tuple[OptionSpec | None, Any]:
    """The option of a flag, and the value that the flag alone means (switches of a choice, `no_` of a switch)."""
    if name in SPECS:
        return SPECS[name], None
    for spec in SPECS.values():
        if name in spec.aliases:
            return spec, None
        if name in spec.switches:
            return spec, spec.switches[name]
        if spec.kind == "bool" and name == f"no_{spec.name}":
            return spec, False
    return None, None


def _is_on(value: Any) -> bool:
    return value is True or (isinstance(value, list) and value[-1:] in (["true"], ["True"], ["1"]))


def _value(spec: OptionSpec, value: Any) -> Any:
    """A flag's value as the option takes it; what is out of bounds is left to the check of the form.

    Raises:
        ValueError: it is of another kind.
    """
    if spec.kind == "bool":
        if isinstance(value, list):
            value = {"true": True, "1": True, "false": False, "0": False}.get(str(value[-1]).lower())
        if not isinstance(value, bool):
            raise ValueError("not a switch")
        return value
    if value is True or value is False:
        raise ValueError("no value")
    items = value if isinstance(value, list) else [value]
    convert: Callable[[Any], Any] = {"int": _whole, "float": _number}.get(spec.kind, str)
    converted = [convert(item) for item in items]
    if spec.kind == "choice" and any(item not in spec.choices for item in converted):
        raise ValueError("not a choice")
    return fitting(spec, converted if spec.is_list else converted[-1])


def _whole(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError("not a whole number")
    return int(number)


def _number(value: Any) -> float:
    return float(value)


def _paths_of(spec: OptionSpec, value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if spec.path is not None and isinstance(item, str)]


def note_table(notes: Sequence[Note]) -> list[Mapping[str, str]]:
    """Notes for the page: what was not understood first."""
    order = {"unknown": 0, "changed": 1, "left_out": 2}
    ranked = sorted(notes, key=lambda note: order[note.kind])
    return [{"name": note.name, "kind": note.kind, "text": note.text} for note in ranked]
