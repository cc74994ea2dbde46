"""The options of two runs side by side: what differs, in the order of the definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.config.cache import CacheLatentsOptions, CacheTextOptions
from backend.config.generate import GenerateOptions
from backend.config.options import Options, OptionSpec, specs
from backend.config.train import TrainOptions

MODELS: dict[str, type[Options]] = {
    "generate": GenerateOptions,
    "train": TrainOptions,
    "cache_latents": CacheLatentsOptions,
    "cache_text": CacheTextOptions,
}
_OTHER = "other"


def compare(a: tuple[str, Mapping[str, Any]], b: tuple[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of what differs between two (kind, options): name, group, unit, a, b, a_default, b_default.

    A value that is not given is the option's default and marked so; an option that a kind of run does not have is
    None there. Keys that no definition knows come last, in the group "other".
    """
    known = [{spec.name: spec for spec in specs(MODELS[kind])} if kind in MODELS else {} for kind, _ in (a, b)]
    names = list(dict.fromkeys([*known[0], *known[1], *sorted({*a[1], *b[1]})]))
    rows = []
    for name in names:
        (left, left_default), (right, right_default) = (
            _value(table.get(name), options, name) for table, (_, options) in zip(known, (a, b), strict=True)
        )
        if left == right and type(left) is type(right):
            continue
        spec = known[0].get(name) or known[1].get(name)
        rows.append(
            {
                "name": name,
                "group": spec.group if spec else _OTHER,
                "unit": spec.unit if spec else "",
                "a": left,
                "b": right,
                "a_default": left_default,
                "b_default": right_default,
            }
        )
    return rows


def _value(spec: OptionSpec | None, options: Mapping[str, Any], name: str) -> tuple[Any, bool]:
    """The value of an option as JSON can hold it, and whether it is the default because it is not given."""
    if name in options:
        value = options[name]
        if spec is not None and spec.kind == "float" and type(value) is int:
            value = float(value)
        plain = isinstance(value, str | int | float | bool) or (
            isinstance(value, list) and all(isinstance(item, str | int | float | bool) for item in value)
        )
        return (value if plain else str(value)), False
    return (spec.default, True) if spec is not None else (None, False)
