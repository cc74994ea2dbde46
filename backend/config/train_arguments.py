"""Training options that are text with a structure of its own: key=value lists, lengths, arguments of the network."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backend.errors import Problem, Problems, UserError

if TYPE_CHECKING:
    from backend.config.train import TrainOptions

_NAME = re.compile(r"[A-Za-z_]\w*")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_NETWORK_NAMES = (
    "loraplus_lr_ratio",
    "rank_dropout",
    "module_dropout",
    "include_patterns",
    "exclude_patterns",
    "verbose",
)
# Arguments of other networks and of layers that this model does not have, which copied commands often carry.
_REFUSED = {
    "conv_dim": "this model has no convolutions",
    "conv_alpha": "this model has no convolutions",
    "algo": "LoHa and LoKr are not supported for Kandinsky 5, only LoRA",
    "preset": "it belongs to LyCORIS, which is not supported for Kandinsky 5",
}


@dataclass(frozen=True)
class NetworkArguments:
    """What `--network_args` can say; patterns are regular expressions for whole dotted names of layers."""

    loraplus_lr_ratio: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    include_patterns: tuple[str, ...] | None = None
    exclude_patterns: tuple[str, ...] | None = None
    verbose: bool = False


def key_values(words: Sequence[str], field: str) -> dict[str, Any]:
    """`name=value` words as a mapping; values are Python literals, anything else is text.

    Only the first `=` separates, so that a value may hold another one. A trailing comma after a word is dropped.

    Raises:
        Problems: words without `=`, names that are none, names given twice; all of them, at `field`.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for word in words:
        name, separator, text = word.partition("=")
        name = name.strip()
        if not separator or not _NAME.fullmatch(name):
            problems.append(Problem(field, f"{word[:80]!r} is not of the form name=value. Write for example eps=1e-8."))
        elif name in values:
            problems.append(Problem(field, f"{name} is given twice. Keep one of them."))
        else:
            values[name] = _literal(text.strip())
    if problems:
        raise Problems(problems)
    return values


def _literal(text: str) -> Any:
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def steps_of(text: str, total: int, field: str) -> int:
    """A length in optimizer steps: a number of steps ("100"), a fraction below 1 ("0.05") or a share ("5%") of `total`.

    Raises:
        UserError: none of these, or longer than the training.
    """
    text = text.strip()
    percent = _PERCENT.fullmatch(text)
    try:
        number = float(percent[1]) / 100.0 if percent else float(text)
    except ValueError:
        number = math.nan
    share = percent is not None or 0.0 < number < 1.0
    whole = math.isfinite(number) and number >= 0.0 and (share or number == int(number))
    if not whole or (percent is not None and number > 1.0):
        raise UserError(
            f"{text[:20]!r} is no length. Write steps (100), a fraction (0.05) or a percentage (5%).", field
        )
    steps = round(number * total) if share else int(number)
    if steps > total:
        raise UserError(f"{steps} steps are longer than the whole training of {total} steps. Choose fewer.", field)
    return steps


def network_arguments(options: TrainOptions) -> NetworkArguments:
    """`--network_args` checked and settled.

    Raises:
        Problems: unknown names, wrong types, shares out of range, patterns that are no regular expressions.
    """
    field = "network_args"
    values = key_values(options.network_args, field)
    problems = [Problem(field, _unknown(name)) for name in values if name not in _NETWORK_NAMES]
    settled: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _NETWORK_NAMES or value is None:
            continue
        try:
            settled[name] = _network_value(name, value)
        except UserError as error:
            problems += error.problems
    if problems:
        raise Problems(problems)
    return NetworkArguments(**settled)


def _unknown(name: str) -> str:
    if name in _REFUSED:
        return f"{name} cannot be used: {_REFUSED[name]}. Leave it out."
    close = difflib.get_close_matches(name, _NETWORK_NAMES, n=1, cutoff=0.6)
    return f"{name} is not an argument of the network.{f' Did you mean {close[0]}?' if close else ''}"


def _network_value(name: str, value: Any) -> Any:
    if name == "verbose":
        if not isinstance(value, bool):
            raise UserError("verbose is true or false.", "network_args")
        return value
    if name.endswith("_patterns"):
        return _patterns(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a number, not {str(value)[:60]!r}.", "network_args")
    if name == "loraplus_lr_ratio":
        if value <= 0:
            raise UserError("loraplus_lr_ratio must be more than 0.", "network_args")
    elif not 0 <= value < 1:
        raise UserError(f"{name} is a share from 0 to below 1, not {value:g}.", "network_args")
    return float(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
        raise UserError(f"{name} is a list of regular expressions, like ['.*cross_attention.*'].", "network_args")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern[:80]!r} in {name} is no regular expression: {error}.", "network_args") from None
    return tuple(patterns)
