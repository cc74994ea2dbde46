"""Looks at all caches of a dataset: what takes long, and is done in a thread."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.config.dataset import DatasetConfig
from backend.data.latent_request import latent_recipe
from backend.data.ledger import DatasetLedger, bytes_of, check_dataset
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.sizes import text_bytes
from backend.data.text_request import text_recipe
from backend.errors import Problems
from k5ui.caching.keeper import sentences
from k5ui.caching.request import KINDS, Wanted, latent_options, problems_of, text_options
from k5ui.caching.sheets import Todo, count_todo, entry_sheet
from k5ui.settings import Settings
from k5ui.text.loader import Texts

_MAX_CONFIG_BYTES = 1_000_000
_MAX_WIDTH = 1 << 16


@dataclass(frozen=True)
class Books:
    """The caches of a dataset: one sheet for each [[datasets]] table, what is left to do, and what keeps it from being
    done (`problems`: field, message)."""

    entries: list[dict[str, Any]]
    ready: bool
    pending: Todo
    everything: Todo
    folders: list[Path] = field(default_factory=list)
    problems: list[dict[str, str | None]] = field(default_factory=list)


def keep_books(
    config: DatasetConfig, path: Path, form: Wanted, settings: Settings, texts: Texts, *, gpu: bool
) -> Books:
    """Check every enabled [[datasets]] table against the weights and the number formats of the form.

    Where weights are missing, caches are compared with the dataset alone. A table that cannot be read says why. `gpu`
    tells which number formats are the default.
    """
    latents, text = recipes(form, path, settings)
    ledgers: list[DatasetLedger] = []
    entries: list[dict[str, Any]] = []
    for entry in config.datasets:
        ledger, problem = None, None
        if entry.enabled:
            try:
                ledger = check_dataset(entry, latents=latents, text=text)
                ledgers.append(ledger)
            except Problems as error:
                problem = sentences(error)
        entries.append(entry_sheet(entry, ledger, problem, texts))
    problems = problems_of(KINDS, form, path, settings)
    dtype = form.values.get("vae_dtype") or ("float16" if gpu else "float32")
    text_size = _mean_text_size(ledgers) or _text_size(form, settings, gpu)
    return Books(
        entries=entries,
        ready=bool(ledgers) and len(ledgers) == len(config.enabled) and all(ledger.ready for ledger in ledgers),
        pending=count_todo(ledgers, dtype, text_size, again=False),
        everything=count_todo(ledgers, dtype, text_size, again=True),
        folders=[entry.cache_directory for entry in config.enabled],
        problems=[{"field": problem.field, "message": problem.message} for problem in problems],
    )


def recipes(form: Wanted, path: Path, settings: Settings) -> tuple[LatentRecipe, TextRecipe]:
    """How caches of this form are made; what cannot be known because of a problem is not compared."""
    try:
        latents = latent_recipe(latent_options(form, path, settings))
    except Problems:
        latents = LatentRecipe(nabla=form.nabla)
    try:
        text = text_recipe(text_options(form, path, settings))
    except Problems:
        text = TextRecipe()
    return latents, text


def _mean_text_size(ledgers: list[DatasetLedger]) -> int:
    """The mean size of the text caches that are there, in bytes; 0: there are none."""
    there = sum(len(ledger.texts) - ledger.text_states["missing"] for ledger in ledgers)
    return sum(bytes_of(ledger.texts) for ledger in ledgers) // there if there else 0


def _text_size(form: Wanted, settings: Settings, gpu: bool) -> int:
    """About how large the cache of an ordinary caption is, in bytes: the encoder's own width decides."""
    dtype = form.values.get("dtype") or ("bfloat16" if gpu else "float32")
    width = _hidden_size(settings.weights_for(form.task).text_encoder_qwen)
    return text_bytes(dtype=dtype) if width is None else text_bytes(width=width, dtype=dtype)


def _hidden_size(folder: str | None) -> int | None:
    """The width of a text encoder as the configuration beside its weights says; None: it does not."""
    try:
        values = json.loads(Path(folder or "", "config.json").read_bytes()[:_MAX_CONFIG_BYTES])
    except (OSError, ValueError, RecursionError):
        return None
    inner = values.get("text_config") if isinstance(values, dict) else None
    found = (inner if isinstance(inner, dict) else values).get("hidden_size") if isinstance(values, dict) else None
    return found if type(found) is int and 0 < found <= _MAX_WIDTH else None
