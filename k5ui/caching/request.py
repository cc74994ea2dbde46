"""What the Caching tab asks for: its form, and the options of the two kinds of runs that the form becomes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from backend.config.cache import CacheLatentsOptions, CacheOptions, CacheTextOptions
from backend.config.cache_checks import check_cache_latents
from backend.config.cache_text_checks import check_cache_text
from backend.config.options import OptionSpec, from_mapping, specs
from backend.config.tasks import TASKS
from backend.errors import Problem, Problems
from k5ui.settings import Settings

What = Literal["all", "latents", "text", "stale"]
Kind = Literal["cache_latents", "cache_text"]
#: In the order in which they are run: captions are quick, and show early whether the encoders are right.
KINDS: tuple[Kind, ...] = ("cache_text", "cache_latents")
DEFAULT_TASK = "k5-demo-t2v"
COMMON = ("task", "device", "batch_size", "num_workers", "nabla_stretch")
LATENTS = ("vae_dtype", "vae_tiling", "posterior", "seed", "disable_cudnn_backend")
TEXT = ("dtype", "quantized_qwen", "qwen_max_length", "clip_max_length")
SPECS: Mapping[str, OptionSpec] = {
    spec.name: spec
    for model in (CacheTextOptions, CacheLatentsOptions)
    for spec in specs(model)
    if spec.name in (*COMMON, *LATENTS, *TEXT)
}
_PARTS: Mapping[Kind, tuple[str, ...]] = {
    "cache_latents": ("vae",),
    "cache_text": ("text_encoder_qwen", "text_encoder_clip"),
}
CacheModel = TypeVar("CacheModel", bound=CacheOptions)


@dataclass(frozen=True)
class Wanted:
    """A caching form: values by option name (absent: the default), and whether valid caches are made again too."""

    values: Mapping[str, Any]
    again: bool = False

    @property
    def task(self) -> str:
        """The model that the caches are for."""
        return self.values["task"]

    @property
    def nabla(self) -> bool:
        """Whether its sizes are multiples of 128."""
        return TASKS[self.task].nabla is not None


def wanted(draft: Mapping[str, Any]) -> Wanted:
    """The form as a draft has it; values of options that do not exist (any more) are left out."""
    given = draft.get("values")
    values = {name: value for name, value in given.items() if name in SPECS} if isinstance(given, dict) else {}
    if values.get("task") not in TASKS:
        values["task"] = DEFAULT_TASK
    return Wanted(values, draft.get("again") is True)


def latent_options(form: Wanted, dataset: Path | None, settings: Settings) -> CacheLatentsOptions:
    """The options of a run that caches latents.

    Raises:
        Problems: values of a wrong type or out of bounds.
    """
    return _options(CacheLatentsOptions, "cache_latents", form, dataset, settings)


def text_options(form: Wanted, dataset: Path | None, settings: Settings) -> CacheTextOptions:
    """The options of a run that caches captions.

    Raises:
        Problems: values of a wrong type or out of bounds.
    """
    return _options(CacheTextOptions, "cache_text", form, dataset, settings)


def _options(model: type[CacheModel], kind: Kind, form: Wanted, dataset: Path | None, settings: Settings) -> CacheModel:
    names = COMMON + (LATENTS if kind == "cache_latents" else TEXT)
    values = {name: form.values[name] for name in names if form.values.get(name) is not None}
    weights = settings.weights_for(form.task)
    values |= {part: getattr(weights, part) for part in _PARTS[kind] if getattr(weights, part) is not None}
    values["nabla_resize"] = form.nabla
    if not form.nabla:
        values.pop("nabla_stretch", None)
    values["skip_existing"] = not form.again
    values["dataset_config"] = os.fspath(dataset) if dataset is not None else None
    return from_mapping(model, values)


def problems_of(kinds: tuple[Kind, ...], form: Wanted, dataset: Path, settings: Settings) -> list[Problem]:
    """Everything that keeps runs of these kinds from starting; what both say is said once."""
    found: list[Problem] = []
    for kind in kinds:
        try:
            if kind == "cache_latents":
                found += check_cache_latents(latent_options(form, dataset, settings))
            else:
                found += check_cache_text(text_options(form, dataset, settings))
        except Problems as error:
            found += error.problems
    return list(dict.fromkeys(found))
