"""One definition of an option, and all that follows from it: flag, TOML key, check, specification for widgets and docs.

A tool's options are one pydantic model whose fields are made by `option()`. Flags keep the names and shapes that users
of command-line trainers know: underscores, switches without a value, lists as several values. Precedence: flags beat
the file given by `--config_file`, which beats the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import shlex
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from backend.errors import Problem, Problems, UserError

OptionsModel = TypeVar("OptionsModel", bound="Options")
PathKind = Literal["file", "folder", "weights", "new_file"]
Level = Literal["basic", "advanced"]


class Options(BaseModel):
    """Base of every tool's options: immutable, strictly typed, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def option(
    default: Any,
    help_text: str,
    *,
    group: str,
    unit: str = "",
    level: Level = "basic",
    path: PathKind | None = None,
    secret: bool = False,
    aliases: Sequence[str] = (),
    switches: Mapping[str, str] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    max_length: int | None = None,
) -> Any:
    """Define one option: its default, one sentence of help, group, unit, bounds and how it is shown.

    `aliases` are further flag names; `switches` maps flags without a value to a value of this option
    (`--sdpa` sets `attention` to `sdpa`), which TOML accepts too (`sdpa = true`).
    """
    extra = {
        "group": group,
        "unit": unit,
        "level": level,
        "path": path,
        "secret": secret,
        "aliases": list(aliases),
        "switches": dict(switches or {}),
    }
    return Field(default, description=help_text, ge=ge, gt=gt, le=le, max_length=max_length, json_schema_extra=extra)


@dataclass(frozen=True)
class OptionSpec:
    """What flags, widgets, tables and checks need to know of one option."""

    name: str
    kind: Literal["bool", "int", "float", "str", "choice"]
    is_list: bool
    optional: bool
    default: Any
    choices: tuple[str, ...]
    minimum: float | None
    exclusive_minimum: float | None
    maximum: float | None
    help: str
    group: str
    unit: str
    level: Level
    path: PathKind | None
    secret: bool
    aliases: tuple[str, ...]
    switches: Mapping[str, str]

    @property
    def type_name(self) -> str:
        """The type in words, as the docs and the golden file show it."""
        base = "one of " + ", ".join(self.choices) if self.kind == "choice" else self.kind
        return f"list of {base}" if self.is_list else base


def specs(model: type[Options]) -> list[OptionSpec]:
    """All options of `model` in the order of their definition."""
    return list(_specs(model))


@functools.cache
def _specs(model: type[Options]) -> tuple[OptionSpec, ...]:
    return tuple(_spec(name, field) for name, field in model.model_fields.items())


def _spec(name: str, field: FieldInfo) -> OptionSpec:
    inner, optional = _strip_optional(field.annotation)
    is_list = typing.get_origin(inner) is list
    if is_list:
        inner = typing.get_args(inner)[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(inner) is Literal:
        kind, choices = "choice", tuple(typing.get_args(inner))
    else:
        kind = {bool: "bool", int: "int", float: "float", str: "str"}[inner]
    extra = typing.cast(dict[str, Any], field.json_schema_extra)
    bounds = {key: getattr(item, key) for item in field.metadata for key in ("ge", "gt", "le") if hasattr(item, key)}
    default = field.get_default(call_default_factory=True)
    return OptionSpec(
        name=name,
        kind=typing.cast(Any, kind),
        is_list=is_list,
        optional=optional,
        default=None if default is PydanticUndefined else default,
        choices=choices,
        minimum=bounds.get("ge"),
        exclusive_minimum=bounds.get("gt"),
        maximum=bounds.get("le"),
        help=field.description or "",
        group=extra["group"],
        unit=extra["unit"],
        level=extra["level"],
        path=extra["path"],
        secret=extra["secret"],
        aliases=tuple(extra["aliases"]),
        switches=extra["switches"],
    )


def _strip_optional(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return members[0], True
    return annotation, False


# --- checking -----------------------------------------------------------------------------------------------------


def from_mapping(model: type[OptionsModel], values: Mapping[str, Any]) -> OptionsModel:
    """Build options from plain values (a TOML table, a form); every problem is reported at once, each with its field.

    Raises:
        Problems: unknown keys (with a suggestion), wrong types, values out of bounds, NaN or infinity.
    """
    known = {spec.name: spec for spec in specs(model)}
    problems: list[Problem] = []
    clean: dict[str, Any] = {}
    switches = {switch: spec for spec in known.values() for switch in spec.switches}
    for key, value in values.items():
        if key in known:
            clean[key] = value
        elif key not in switches:
            problems.append(Problem(key, f"is not an option.{did_you_mean(key, known)}"))
    for key in [key for key in values if key in switches]:
        problems += _apply_switch(switches[key], key, values[key], clean)
    try:
        options = model.model_validate(clean)
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors(include_url=False)]
        raise Problems(problems) from None
    for key, value in clean.items():
        items = value if isinstance(value, list) else [value]
        if "--" in items:
            problems.append(Problem(key, "'--' is not a value. Write something else."))
        if any(isinstance(item, str) and "\0" in item for item in items):
            problems.append(Problem(key, "holds a NUL character, which no command line and no path can. Remove it."))
    if problems:
        raise Problems(problems)
    return options


def _apply_switch(spec: OptionSpec, key: str, value: Any, clean: dict[str, Any]) -> list[Problem]:
    if not isinstance(value, bool):
        return [Problem(key, f"is a switch. Write true or false, not {value!r}.")]
    if not value:
        return []
    chosen = spec.switches[key]
    if clean.get(spec.name, chosen) != chosen:
        return [Problem(key, f"contradicts {spec.name} = {clean[spec.name]}. Choose one of them.")]
    clean[spec.name] = chosen
    return []


def did_you_mean(name: str, known: Mapping[str, OptionSpec]) -> str:
    """' Did you mean X?' for a name that is close to a known option, alias or switch, else an empty string."""
    names = [*known, *(extra for spec in known.values() for extra in (*spec.aliases, *spec.switches))]
    alias = next((spec.name for spec in known.values() if name in spec.aliases), None)
    close = [alias] if alias else difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _problem(details: ErrorDetails) -> Problem:
    field = str(details["loc"][0]) if details["loc"] else None
    context = details.get("ctx", {})
    given = repr(details.get("input"))
    given = given if len(given) <= 60 else given[:57] + "..."
    sentences = {
        "greater_than_equal": f"must be at least {context.get('ge')}, not {given}.",
        "greater_than": f"must be more than {context.get('gt')}, not {given}.",
        "less_than_equal": f"must be at most {context.get('le')}, not {given}.",
        "finite_number": f"must be a finite number, not {given}.",
        "int_type": f"must be a whole number, not {given}.",
        "int_from_float": f"must be a whole number, not {given}.",
        "float_type": f"must be a number, not {given}.",
        "string_type": f"must be text, not {given}.",
        "bool_type": f"must be true or false, not {given}.",
        "list_type": f"must be a list, not {given}.",
        "literal_error": f"must be one of {context.get('expected')}, not {given}.",
        "string_too_long": f"is too long: at most {context.get('max_length')} characters.",
    }
    return Problem(field, sentences.get(details["type"], f"{details['msg']} (given: {given})."))


# --- the command line ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the options, and where a run folder was asked for."""

    options: Any
    config_file: str | None
    run_dir: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. See --help for the options.")


def build_parser(model: type[Options], program: str, description: str) -> argparse.ArgumentParser:
    """The argparse parser of `model`; values stay text here, `parse_command_line` converts and checks them."""
    parser = _Parser(prog=program, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in specs(model):
        group = groups.setdefault(spec.group, parser.add_argument_group(spec.group))
        _add_flag(group, spec)
    general = parser.add_argument_group("run")
    general.add_argument("--config_file", metavar="FILE", help="TOML file with options; flags beat it.")
    general.add_argument(
        "--run_dir", metavar="FOLDER", help="Run folder for the journal, so that the app shows the run."
    )
    return parser


def _add_flag(group: argparse._ArgumentGroup, spec: OptionSpec) -> None:
    flags = [f"--{name}" for name in (spec.name, *spec.aliases)]
    text = (spec.help + (f" [{spec.unit}]" if spec.unit else "")).replace("%", "%%")
    if spec.kind == "bool":
        group.add_argument(*flags, action="store_const", const=True, dest=spec.name, help=text)
        group.add_argument(
            f"--no_{spec.name}", action="store_const", const=False, dest=spec.name, help=argparse.SUPPRESS
        )
    elif spec.is_list:
        group.add_argument(*flags, nargs="*", action="extend", dest=spec.name, metavar=spec.kind.upper(), help=text)
    else:
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices and len(spec.choices) < 8 else spec.kind.upper()
        group.add_argument(*flags, dest=spec.name, metavar=metavar, help=text)
    for flag, value in spec.switches.items():
        group.add_argument(
            f"--{flag}",
            action="append_const",
            const=value,
            dest=f"switch {spec.name}",
            help=f"Same as --{spec.name} {value}.",
        )


def parse_command_line(model: type[OptionsModel], argv: Sequence[str], program: str, description: str) -> CommandLine:
    """Parse flags and the file named by `--config_file`, convert and check; all problems are reported together.

    Raises:
        Problems: unknown flags, unreadable file, wrong or missing values, values out of bounds.
    """
    if any(word.startswith("--") and word.partition("=")[2] == "--" for word in argv):
        raise UserError("'--' is not a value. Write something else after the '='.")
    namespace, unknown = build_parser(model, program, description).parse_known_args(list(argv))
    given = vars(namespace)
    known = {spec.name: spec for spec in specs(model)}
    problems = [
        Problem(None, _unknown_word(word, known))
        for before, word in zip([None, *unknown], unknown, strict=False)
        if not (before and before.startswith("--") and "=" not in before and not word.startswith("--"))
    ]
    config_file, run_dir = given.pop("config_file", None), given.pop("run_dir", None)
    values: dict[str, Any] = load_toml(config_file, "config_file") if config_file else {}
    for spec in known.values():
        chosen = set(given.pop(f"switch {spec.name}", []))
        explicit = {given[spec.name]} if chosen and spec.name in given else set()
        if len(chosen | explicit) > 1:
            problems.append(
                Problem(spec.name, f"{', '.join(sorted(chosen | explicit))} exclude each other. Choose one.")
            )
        elif chosen:
            given[spec.name] = chosen.pop()
        if spec.name in given:
            for switch in spec.switches:
                values.pop(switch, None)
            values[spec.name], trouble = _from_text(spec, given[spec.name])
            problems += trouble
            if trouble:
                del values[spec.name]
    try:
        options = from_mapping(model, values)
    except Problems as error:
        raise Problems([*problems, *error.problems]) from None
    if problems:
        raise Problems(problems)
    return CommandLine(options, config_file, run_dir)


def _unknown_word(word: str, known: Mapping[str, OptionSpec]) -> str:
    if not word.startswith("--"):
        return f"'{word}' belongs to no flag. Put text with spaces or a leading dash as --flag='...'."
    name = word[2:].split("=")[0]
    return f"--{name} is not a flag.{did_you_mean(name, known).replace('mean ', 'mean --')}"


def _from_text(spec: OptionSpec, value: Any) -> tuple[Any, list[Problem]]:
    convert: Callable[[str], Any] = {"int": int, "float": float}.get(spec.kind, lambda text: text)
    words = {"int": "a whole number", "float": "a number"}.get(spec.kind, "text")
    try:
        if spec.is_list:
            return [convert(item) for item in value], []
        return (convert(value) if isinstance(value, str) else value), []
    except ValueError:
        return None, [Problem(spec.name, f"must be {words}, not {value!r}.")]


def to_command(options: Options, entry: str) -> list[str]:
    """The argument list of the command that a person would type for `options`: only what differs from the defaults."""
    words = ["python", "-m", f"backend.{entry}"]
    for spec in specs(type(options)):
        value = getattr(options, spec.name)
        if value == spec.default:
            continue
        if spec.kind == "bool":
            words.append(f"--{spec.name}" if value else f"--no_{spec.name}")
        else:
            words += [f"--{spec.name}={item}" for item in (value if spec.is_list else [value]) if item is not None]
    return words


def to_command_text(options: Options, entry: str) -> str:
    """`to_command` as one line that a POSIX shell reads back."""
    return shlex.join(to_command(options, entry))


# --- TOML ---------------------------------------------------------------------------------------------------------


def load_toml(path: str | Path, field: str | None = None) -> dict[str, Any]:
    """Read a TOML file of options; tables are flattened into one mapping, as users of other trainers expect.

    Raises:
        UserError: the file is missing, not UTF-8, not TOML, larger than 1 MB, or holds one key twice.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 1_000_000:
            raise UserError(f"{path} is larger than 1 MB. An options file is a few lines of TOML.", field)
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.", field) from None
    except (ValueError, RecursionError) as error:  # Not TOML, not UTF-8, or a number of thousands of digits.
        raise UserError(f"{path} is not valid TOML: {error}.", field) from None
    flat: dict[str, Any] = {}
    for key, value in document.items():
        for name, item in value.items() if isinstance(value, dict) else [(key, value)]:
            if name in flat:
                raise UserError(f"{path} gives {name} twice. Keep one of them.", field)
            flat[name] = item
    return flat


def to_toml(options: Options) -> str:
    """All options that have a value, as TOML that `load_toml` reads back equal (checked here before it is returned)."""
    document = tomlkit.document()
    for spec in specs(type(options)):
        value = getattr(options, spec.name)
        if value is not None:
            document.add(spec.name, tomlkit.item(value))
    text = tomlkit.dumps(document)
    if tomllib.loads(text) != {k: v for k, v in options.model_dump().items() if v is not None}:
        raise ValueError("The TOML writer changed a value.")
    return text
