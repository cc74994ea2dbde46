"""What the page says before a start: items, steps, epochs, time, disk, memory. Nothing that nobody knows is said."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.config.checkpoint import TransformerConfig, identify
from backend.config.checks import weight_paths
from backend.config.prompts import read_prompt_file
from backend.config.tasks import TASKS, valid_frames
from backend.config.train import TrainOptions
from backend.config.train_checks import makes_samples
from backend.data.epochs import Length, plan_length
from backend.errors import K5Error, UserError
from backend.files import existing_parent
from k5ui.text.loader import Texts
from k5ui.training.pace import Pace
from k5ui.training.stock import Stock

_BYTES = {"fp16": 2, "bf16": 2}
# A state holds the LoRA and two moments of the optimizer, all in 32 bits.
_STATE_BYTES = 12
_VIDEO_BYTES_PER_PIXEL = 0.1
_LAST_MANY = 10**9


@dataclass(frozen=True)
class Saves:
    """How many files of each kind will lie on the disk in the end."""

    loras: int
    states: int


def forecast(
    options: TrainOptions, stock: Stock | None, pace: Pace | None, folder: Path, texts: Texts, done: int = 0
) -> dict[str, Any]:
    """The numbers of a training, and the same as a sentence; None where nobody can know.

    Keys: items, repeats, batches_per_epoch, steps_per_epoch, epochs, total_steps, seconds, disk_bytes, memory_bytes,
    free_bytes (on the disk of `folder`), text. `done` are steps that a state has already, which take no time again.
    """
    length = length_of(options, stock)
    disk = _disk_bytes(options, length) if length is not None else None
    if stock is not None and options.cache_missing and disk is not None:
        disk += stock.todo_bytes
    facts: dict[str, Any] = {
        "items": stock.items if stock is not None else None,
        "repeats": list(stock.repeats) if stock is not None else None,
        "seconds": pace.seconds * max(0, length.total_steps - done) if pace and length else None,
        "seconds_per_step": pace.seconds if pace is not None else None,
        "disk_bytes": disk,
        "memory_bytes": pace.memory if pace is not None else None,
        "free_bytes": _free(folder),
    }
    names = ("batches_per_epoch", "steps_per_epoch", "epochs", "total_steps")
    facts |= {name: getattr(length, name) if length is not None else None for name in names}
    return facts | {"text": _sentence(facts, texts)}


def batch_size_of(stock: Stock, options: TrainOptions) -> float:
    """The mean size of what one step trains on, in megapixel-frames: what its duration depends on."""
    items = sum(count for count, _ in stock.groups)
    batches = sum(-(-count // size) for count, size in stock.groups)
    return stock.pixels * items / batches * options.gradient_accumulation_steps if batches else 0.0


def length_of(options: TrainOptions, stock: Stock | None) -> Length | None:
    """How long a training is; None while nobody knows its dataset, or when there is nothing in it."""
    if stock is None:
        return None
    length = plan_length(
        stock.groups, 1, options.gradient_accumulation_steps, options.max_train_steps, options.max_train_epochs
    )
    return length if length.total_steps else None


def _sentence(facts: dict[str, Any], texts: Texts) -> str:
    if facts["total_steps"] is None:
        return ""
    low, high = facts["repeats"]
    repeats = str(low) if low == high else f"{low}-{high}"
    key = "train.sum.epochs" if facts["epochs"] != 1 else "train.sum.one_epoch"
    epochs = texts(key, n=facts["epochs"], total=_spaced(facts["total_steps"]))
    # Batches of several items and unequal repeats are no multiplication that one could follow.
    even = low == high and facts["items"] * low == facts["steps_per_epoch"]
    key = "train.sum.epoch" if even else "train.sum.epoch_batches"
    words = texts(key, n=facts["items"], repeats=repeats, steps=_spaced(facts["steps_per_epoch"]))
    return f"{words} · {epochs}"


def _spaced(number: int) -> str:
    """Thousands apart by a thin space that no line is broken at."""
    return f"{number:,}".replace(",", "\u202f")


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(existing_parent(folder)).free
    except OSError:
        return None


def lora_parameters(config: TransformerConfig, rank: int) -> int:
    """Parameters of a LoRA of all attention and feed-forward layers of the text and visual blocks."""
    square, wide = 2 * config.model_dim, config.model_dim + config.ff_dim
    text = 4 * square + 2 * wide
    visual = 8 * square + 2 * wide
    return rank * (config.num_text_blocks * text + config.num_visual_blocks * visual)


def _disk_bytes(options: TrainOptions, length: Length) -> int | None:
    path = weight_paths(options).dit
    try:
        config = identify(path).config if path is not None else None
    except UserError:
        return None
    if config is None:
        return None
    parameters = lora_parameters(config, options.network_dim)
    saves = count_saves(options, length)
    lora = parameters * _BYTES.get(options.save_precision, 4)
    return saves.loras * lora + saves.states * parameters * _STATE_BYTES + _sample_bytes(options, length)


def count_saves(options: TrainOptions, length: Length) -> Saves:
    """LoRA files and states that are left at the end; the last epoch and the end are one file each."""
    by_epoch = (length.epochs - 1) // options.save_every_n_epochs if options.save_every_n_epochs else 0
    by_step = (length.total_steps - 1) // options.save_every_n_steps if options.save_every_n_steps else 0
    loras = min(by_epoch, _kept(options.save_last_n_epochs))
    loras += min(by_step, _kept_by_distance(options.save_last_n_steps, options.save_every_n_steps))
    states = 0
    if options.save_state:
        states = min(by_epoch, _kept(options.save_last_n_epochs_state or options.save_last_n_epochs))
        distance = options.save_last_n_steps_state or options.save_last_n_steps
        states += min(by_step, _kept_by_distance(distance, options.save_every_n_steps))
    return Saves(loras + 1, states + (options.save_state or options.save_state_on_train_end))


def _kept(last: int | None) -> int:
    return _LAST_MANY if last is None else last


def _kept_by_distance(distance: int | None, every: int | None) -> int:
    return _LAST_MANY if distance is None or not every else distance // every + 1


def _sample_bytes(options: TrainOptions, length: Length) -> int:
    if not makes_samples(options) or options.sample_prompts is None or options.task is None:
        return 0
    try:
        entries, _ = read_prompt_file(options.sample_prompts)
    except K5Error:
        return 0
    task = TASKS[options.task]
    sizes = [
        (entry.get("width") or task.width)
        * (entry.get("height") or task.height)
        * valid_frames(entry.get("frames") or task.frames)
        for _, entry in entries
    ]
    times = int(options.sample_at_first)
    times += length.total_steps // options.sample_every_n_steps if options.sample_every_n_steps else 0
    times += length.epochs // options.sample_every_n_epochs if options.sample_every_n_epochs else 0
    return int(times * sum(sizes) * _VIDEO_BYTES_PER_PIXEL)
