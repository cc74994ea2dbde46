"""What a training would train on: items by bucket, and whether all of their caches are there and up to date."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from backend.config.cache import CacheLatentsOptions, CacheTextOptions
from backend.config.checks import weight_paths
from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.config.train import TrainOptions
from backend.data.latent_request import latent_recipe, nabla_mode
from backend.data.ledger import DatasetLedger, check_dataset, not_valid
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.text_request import text_recipe
from backend.errors import Problems
from k5ui.caching.keeper import sentences
from k5ui.caching.sheets import count_todo
from k5ui.text.loader import Texts


@dataclass(frozen=True)
class Stock:
    """The datasets of a configuration as a training would find them.

    Attributes:
        groups: for every bucket of every dataset its items times repeats and the size of its batches.
        items: of all datasets, without repeats.
        repeats: how often each item occurs in an epoch, smallest and largest.
        missing: caches of items and captions that are missing or not usable, by kind ("latents", "texts").
        pixels: mean size of an item in megapixel-frames.
        todo_bytes: what caching the rest would write.
        held: whether items are held out for validation (a share of them then leaves `groups`).
        problems: sentences of datasets that cannot be read or lack captions.
    """

    groups: tuple[tuple[int, int], ...] = ()
    items: int = 0
    repeats: tuple[int, int] = (1, 1)
    missing: Mapping[str, int] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=dict)
    pixels: float = 0.0
    todo_bytes: int = 0
    held: bool = False
    stills: int = 0
    problems: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether training can start without caching."""
        return bool(self.items) and not self.problems and not any(self.missing.values())


def take_stock(config: DatasetConfig, options: TrainOptions, *, gpu: bool) -> Stock:
    """Check the caches of every enabled dataset against the weights of `options`. Takes as long as a check takes."""
    latents, text = _recipes(options)
    ledgers: list[tuple[DatasetEntry, DatasetLedger]] = []
    problems: list[str] = []
    for entry in config.enabled:
        try:
            ledger = check_dataset(entry, latents=latents, text=text)
        except Problems as error:
            problems.append(sentences(error))
            continue
        problems += [problem.message for problem in ledger.problems]
        ledgers.append((entry, ledger))
    todo = count_todo([ledger for _, ledger in ledgers], "float16" if gpu else "float32", _TEXT_BYTES, again=False)
    shapes = [(entry, shape, count) for entry, ledger in ledgers for shape, count in ledger.shapes.items()]
    items = sum(count for _, _, count in shapes)
    repeats = [entry.num_repeats for entry, ledger in ledgers if ledger.shapes] or [1]
    size = sum(count * frames * width * height for _, (frames, width, height), count in shapes)
    unusable = [_unusable(ledger) for _, ledger in ledgers]
    states: Counter[str] = Counter()
    for _, ledger in ledgers:
        states.update(ledger.latent_states)
        states.update(ledger.text_states)
    return Stock(
        groups=tuple((_trained(entry, count) * entry.num_repeats, entry.batch_size) for entry, _, count in shapes),
        items=items,
        repeats=(min(repeats), max(repeats)),
        missing={name: sum(counts[name] for counts in unusable) for name in ("latents", "texts")},
        states={state: count for state, count in states.items() if count},
        pixels=size / 1e6 / items if items else 0.0,
        todo_bytes=sum(todo.bytes.values()),
        held=any(entry.validation_split > 0 for entry, ledger in ledgers if ledger.shapes),
        stills=sum(count for entry, _, count in shapes if entry.kind == "image"),
        problems=tuple(dict.fromkeys(problems)),
    )


#: About the size of the cache of a caption, for what caching would need.
_TEXT_BYTES = 1 << 20


def _trained(entry: DatasetEntry, count: int) -> int:
    """Items of a bucket that are not held out; which ones is decided by a hash, so this is the expected number."""
    return max(1, round(count * (1.0 - entry.validation_split))) if count else 0


def _unusable(ledger: DatasetLedger) -> dict[str, int]:
    return {
        "latents": sum(not row.verdict.usable for row in not_valid(ledger.latents)),
        "texts": sum(not row.verdict.usable for row in not_valid(ledger.texts)),
    }


def _recipes(options: TrainOptions) -> tuple[LatentRecipe, TextRecipe]:
    """How the caches must have been made; what cannot be known because of a problem is not compared."""
    paths = weight_paths(options)
    sizes: dict[str, Any] = {"nabla_resize": options.nabla_resize, "nabla_stretch": options.nabla_stretch}
    asked = CacheLatentsOptions(task=options.task, vae=paths.vae, **sizes)
    try:
        # Number format and posterior are the business of whoever cached; they are not compared.
        latents = replace(latent_recipe(asked), posterior=None, vae_dtype=None)
    except Problems:
        latents = LatentRecipe(nabla=nabla_mode(asked))
    captions = CacheTextOptions(
        task=options.task, text_encoder_qwen=paths.text_encoder_qwen, text_encoder_clip=paths.text_encoder_clip
    )
    try:
        text = text_recipe(captions)
    except Problems:
        text = TextRecipe()
    return latents, text


def stock_line(stock: Stock, texts: Texts) -> str:
    """The state of the caches in one line."""
    if stock.problems:
        return stock.problems[0]
    if not stock.items:
        return texts("train.stock.empty")
    if stock.ready:
        return texts("train.stock.ready", n=stock.items)
    parts = [texts(f"train.stock.{name}", n=count) for name, count in stock.missing.items() if count]
    stale = sum(stock.states.get(state, 0) for state in ("stale", "broken"))
    if stale:
        parts.append(texts("train.stock.stale", n=stale))
    return texts("train.stock.missing", n=stock.items, what=", ".join(parts))
