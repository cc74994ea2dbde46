"""Where a PEFT file's alpha comes from: its own metadata, or the adapter_config.json beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import UserError

METADATA_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1_000_000
FIELD = "lora_weight"


@dataclass(frozen=True)
class AdapterConfig:
    """The parts of a PEFT configuration that decide the scale of a layer."""

    source: str = ""
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alphas(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """alpha of every layer in `ranks` (name in the file -> rank): by a pattern, else the common one, else the rank.

        With `use_rslora` the scale is alpha / sqrt(rank); that is returned as the alpha whose alpha / rank is the same.

        Raises:
            UserError: the configuration gives another rank, or names layers that the file does not have.
        """
        unused = [p for p in (*self.alpha_pattern, *self.rank_pattern) if not any(_fits(p, stem) for stem in ranks)]
        if ranks and unused:
            raise self._foreign(f"names the layer {unused[0][:100]!r}, which the file does not have")
        found: dict[str, float] = {}
        for stem, rank in ranks.items():
            expected = _by_pattern(self.rank_pattern, stem, self.rank)
            if expected is not None and expected != rank:
                raise self._foreign(f"says rank {expected:g}, but {stem[:200]} has rank {rank}")
            alpha = _by_pattern(self.alpha_pattern, stem, self.alpha)
            if alpha is None:
                found[stem] = float(rank)
            else:
                found[stem] = alpha * math.sqrt(rank) if self.rslora else alpha
        return found

    def _foreign(self, reason: str) -> UserError:
        return UserError(
            f"{self.source} {reason}: it belongs to another LoRA. "
            "Keep each LoRA in a folder with its own configuration.",
            FIELD,
        )


def _fits(pattern: str, stem: str) -> bool:
    return stem == pattern or stem.endswith(f".{pattern}")


def _by_pattern(patterns: Mapping[str, float], stem: str, default: float | None) -> float | None:
    # The longest name is the most exact one: "to_query" loses against "blocks.3.self_attention.to_query".
    fitting = [pattern for pattern in patterns if _fits(pattern, stem)]
    return patterns[max(fitting, key=len)] if fitting else default


def adapter_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    """The configuration of the LoRA file `path`; an empty one when neither its metadata nor its folder has any.

    Raises:
        UserError: the configuration is damaged, or asks for DoRA.
    """
    if METADATA_KEY in metadata:
        return _parse(f"{METADATA_KEY} in {path}", metadata[METADATA_KEY])
    beside = path.parent / CONFIG_NAME
    if not beside.is_file():
        return AdapterConfig()
    try:
        if beside.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{beside} is too large for a configuration. Get it again.", FIELD)
        return _parse(str(beside), beside.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{beside} cannot be read: {error}. Check the file, or take it away.", FIELD) from error


def _parse(source: str, text: str) -> AdapterConfig:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON. Get the LoRA again.", FIELD) from error
    if not isinstance(table, dict):
        raise UserError(f"{source} is not a table of settings. Get the LoRA again.", FIELD)
    # diffusers writes one table for all parts of a pipeline: "transformer.r", "transformer.lora_alpha", ...
    settings = {str(key).removeprefix("transformer."): value for key, value in table.items()}
    if settings.get("use_dora"):
        raise UserError(f"{source} says that this is DoRA, which is not supported. Use a plain LoRA.", FIELD)
    rank = _number(source, "r", settings.get("r"))
    return AdapterConfig(
        source=source,
        rank=None if rank is None else int(rank),
        alpha=_number(source, "lora_alpha", settings.get("lora_alpha")),
        rank_pattern=_patterns(source, "rank_pattern", settings.get("rank_pattern")),
        alpha_pattern=_patterns(source, "alpha_pattern", settings.get("alpha_pattern")),
        rslora=bool(settings.get("use_rslora")),
    )


def _number(source: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{source}: {key} must be a number, not {str(value)[:60]!r}. Get the LoRA again.", FIELD)
    return float(value)


def _patterns(source: str, key: str, value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key} must be a table, not {str(value)[:60]!r}. Get the LoRA again.", FIELD)
    numbers = {str(name): _number(source, f"{key} of {name}", number) for name, number in value.items()}
    return {name: number for name, number in numbers.items() if number is not None}
