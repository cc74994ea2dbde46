"""Caches captions: every distinct text is encoded once, and written for each source that has it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from backend.caching.caption_plan import SHOWN, Caption, collect_captions, counted, judge_captions, share_captions
from backend.caching.ledger_command import prune_caches, run_ledger
from backend.caching.share import Share
from backend.caching.writing import WriteBehind
from backend.config.cache import CacheTextOptions
from backend.config.cache_text_checks import check_cache_text
from backend.config.dataset import DatasetConfig, load_dataset_config
from backend.data.cache_files import write_text_cache
from backend.data.recipes import TextRecipe
from backend.data.sizes import text_bytes
from backend.data.text_request import encoder_paths, locate_encoders, recipe_of, text_recipe
from backend.errors import Problem, Problems, Stopped, UserError
from backend.files import existing_parent, require_free_space
from backend.model.device import device_of_process, resolve_dtype
from backend.progress import Reporter
from backend.text.embed import memory_of, require_numbers, short
from backend.text.locate import CLIP, QWEN, EncoderFiles
from backend.text.templates import TEMPLATES, get_template

if TYPE_CHECKING:
    from backend.text.encoders import QwenEncoder, Tokens

_DEFAULT_WIDTH = 3584
# Ordinary texts have fewer tokens than this many bytes would give.
_BYTES_PER_TOKEN = 3


def cache_captions(options: CacheTextOptions, reporter: Reporter, run_dir: Path | None) -> list[str]:
    """Encode the captions of all enabled datasets and write them beside their latents.

    Videos get the template and the token limit of video models, images those of image models, as in generation. A
    cache is the same bytes whichever other captions were encoded with it. Of several processes (`accelerate launch`)
    each encodes its part of the captions.

    Returns:
        The cache folders, or the report's file with `check`.

    Raises:
        Problems: everything that is wrong with the request.
        UserError: no caption can be read, or the disk is full.
        EngineError: phase "text"; an encoder gave values that are not numbers, or memory ran out.
        Stopped: the app asked for it; what was written stays.
    """
    share = Share.of_process()
    config, device = _check_request(options, share, run_dir)
    if share.first:
        for notice in config.notices:
            reporter.warning(notice)
    if options.check:
        recipe = _recipe_to_compare(options, device)
        return run_ledger(config, options, reporter, None, recipe, run_dir) if share.first else []
    dtype = resolve_dtype(options.dtype, device)
    qwen, clip = locate_encoders(options)
    work = _Work(options, reporter, device, dtype, recipe_of(options, qwen, clip, _name(dtype)), qwen, clip)
    captions = _choose(work, config, share)
    if captions:
        work.encode(captions)
    if options.prune and share.first:
        prune_caches(config, options, reporter, None, work.recipe, run_dir)
    return list(dict.fromkeys(os.fspath(entry.cache_directory) for entry in config.enabled))


def _check_request(options: CacheTextOptions, share: Share, run_dir: Path | None) -> tuple[DatasetConfig, torch.device]:
    problems = check_cache_text(options, run_dir)
    device = torch.device("cpu")
    try:
        device = device_of_process(options.device, share.local_rank, cpu_only=share.cpu_only)
    except UserError as error:
        problems += error.problems
    if problems:
        raise Problems(problems)
    assert options.dataset_config is not None
    return load_dataset_config(options.dataset_config), device


def _recipe_to_compare(options: CacheTextOptions, device: torch.device) -> TextRecipe:
    """Without encoders only the datasets are compared; with them also the number format that caching would choose."""
    return text_recipe(options, _name(resolve_dtype(options.dtype, device)) if all(encoder_paths(options)) else None)


def _choose(work: _Work, config: DatasetConfig, share: Share) -> list[Caption]:
    """The captions that this process has to encode."""
    reporter = work.reporter
    reporter.phase("text", "Reading the captions")
    collected = collect_captions(config)
    if share.first:
        for warning in collected.warnings:
            reporter.warning(Problem(None, warning))
    captions = share_captions(collected.captions, share)
    if work.options.skip_existing:
        judged = judge_captions(captions, work.recipe)
        found = ", ".join(f"{count} {state}" for state, count in judged.states.items())
        changes = f"; {', '.join(f'{reason} ({count})' for reason, count in judged.reasons.items())}"
        reporter.phase("text", f"Text caches: {found or 'none'}{changes if judged.reasons else ''}")
        for reason, count in judged.refused.items():
            reporter.warning(Problem(None, f"{counted(count, 'text cache')} will be made again: {reason}."))
        captions = judged.captions
    _require_space(work, captions)
    reporter.phase("text", f"To encode: {_amount(captions)}" if captions else "There is nothing to encode.")
    return captions


def _require_space(work: _Work, captions: Sequence[Caption]) -> None:
    """Raise when a disk has less room than the new caches need; those that are replaced give theirs back."""
    width = _width(work.qwen)
    needed: dict[int, tuple[int, str]] = {}
    disks: dict[str, int] = {}
    for caption in captions:
        limit = work.options.qwen_max_length or TEMPLATES[caption.kind].max_length
        tokens = min(limit, len(caption.text.encode("utf-8")) // _BYTES_PER_TOKEN + 2)
        size = text_bytes(tokens, width, _name(work.dtype)) + len(caption.text)
        for path in caption.paths:
            folder = os.path.dirname(path)
            if folder not in disks:
                disks[folder] = os.stat(existing_parent(Path(folder).absolute())).st_dev
            try:
                old = os.path.getsize(path)
            except OSError:
                old = 0
            total, first = needed.get(disks[folder], (size, folder))
            needed[disks[folder]] = (total + max(size - old, 0), first)
    problems: list[Problem] = []
    for size, folder in needed.values():
        try:
            require_free_space(folder, size, "dataset_config")
        except UserError as error:
            problems += error.problems
    if problems:
        raise Problems(problems)


def _width(qwen: EncoderFiles) -> int:
    inner = qwen.config.get("text_config")
    width = (inner if isinstance(inner, dict) else qwen.config).get("hidden_size")
    return width if isinstance(width, int) and 0 < width < 1 << 20 else _DEFAULT_WIDTH


def _amount(captions: Sequence[Caption]) -> str:
    return (
        f"{counted(len(captions), 'caption')} for {counted(sum(len(caption.paths) for caption in captions), 'cache')}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Pooled:
    """CLIP's vectors: one table [N, D] float32, and the row of each text."""

    table: torch.Tensor
    rows: dict[str, int]

    def of(self, text: str) -> torch.Tensor:
        """The vector [D] of `text`."""
        return self.table[self.rows[text]]


@dataclass
class _Work:
    """What encoding needs to know, and what it found: captions that were cut, and the bytes that were written."""

    options: CacheTextOptions
    reporter: Reporter
    device: torch.device
    dtype: torch.dtype
    recipe: TextRecipe
    qwen: EncoderFiles
    clip: EncoderFiles
    cuts: int = 0
    cuts_by_clip: int = 0
    bytes: int = 0

    def encode(self, captions: Sequence[Caption]) -> None:
        """Encode and write `captions`: CLIP for all of them first, because it is small and its vectors too."""
        pooled = self._encode_clip(list(dict.fromkeys(caption.text for caption in captions)))
        writer = WriteBehind()
        try:
            self._encode_qwen(captions, pooled, writer)
        finally:
            # What is encoded is written even when the work ends early; a failure to write is told first.
            writer.finish()
        self._tell_cuts()
        self.reporter.phase("text", f"Encoded: {_amount(captions)} of {self.bytes / 1e6:.3g} MB together")

    def _encode_clip(self, texts: Sequence[str]) -> _Pooled:
        from backend.text.encoders import ClipEncoder

        table: torch.Tensor | None = None
        with memory_of(CLIP, self.device):
            self.reporter.phase("load", "Loading CLIP")
            encoder = ClipEncoder(self.clip, device=self.device, max_length=self.options.clip_max_length)
            self.reporter.phase("text", f"Encoding {len(texts)} captions with CLIP")
            meter = self.reporter.item_meter(len(texts), "captions")
            for number, text in enumerate(texts):
                self._stop_if_asked(number, 0, len(texts))
                vector = require_numbers(encoder.encode(text), CLIP, text)
                if table is None:  # one block of memory: very many small tensors cost several times their numbers
                    table = torch.empty(len(texts), vector.shape[0])
                table[number] = vector
                self.cuts_by_clip += encoder.removed(text) > 0
                meter.done()
            del encoder
        assert table is not None
        return _Pooled(table, {text: number for number, text in enumerate(texts)})

    def _encode_qwen(self, captions: Sequence[Caption], pooled: _Pooled, writer: WriteBehind) -> None:
        with memory_of(QWEN, self.device):
            self.reporter.phase("load", "Loading Qwen2.5-VL")
            encoders = self._load_qwen(captions)
            self.reporter.phase("text", f"Encoding {len(captions)} captions with Qwen2.5-VL")
            meter = self.reporter.item_meter(len(captions), "captions")
            for number, caption in enumerate(captions):
                self._stop_if_asked(number, number, len(captions))
                text = self._hidden_states(encoders[caption.kind], caption)
                writer.put(partial(self._write, caption, text, pooled.of(caption.text)))
                meter.done(item=caption.name, dataset=caption.dataset)
            encoders.clear()

    def _load_qwen(self, captions: Sequence[Caption]) -> dict[str, QwenEncoder]:
        """One encoder for each kind of dataset; all of them share the weights."""
        from backend.text.encoders import QwenEncoder

        encoders: dict[str, QwenEncoder] = {}
        for kind in dict.fromkeys(caption.kind for caption in captions):
            template = get_template(kind)
            if encoders:
                encoders[kind] = next(iter(encoders.values())).with_template(template)
            else:
                encoders[kind] = QwenEncoder(
                    self.qwen,
                    template,
                    device=self.device,
                    dtype=self.dtype,
                    quantised=self.options.quantized_qwen,
                )
            for warning in encoders[kind].warnings:
                self.reporter.warning(Problem(None, warning))
        return encoders

    def _hidden_states(self, encoder: QwenEncoder, caption: Caption) -> torch.Tensor:
        limit = self.options.qwen_max_length or encoder.template.max_length
        tokens = encoder.tokenise(caption.text, limit)
        if tokens.removed:
            self.cuts += 1
            if self.cuts <= SHOWN:
                self.reporter.warning(Problem(None, _cut_warning(caption, tokens, encoder.template.name)))
        # One at a time: a cache must not depend on which captions happened to be encoded with it.
        return require_numbers(next(encoder.encode([tokens])), QWEN, caption.text)

    def _write(self, caption: Caption, text: torch.Tensor, pooled: torch.Tensor) -> None:
        metadata = self.recipe.metadata(caption.kind, caption.text)
        for path in caption.paths:
            self.bytes += write_text_cache(path, text, pooled, metadata)

    def _stop_if_asked(self, number: int, written: int, total: int) -> None:
        if number % (self.options.batch_size or 1) == 0 and self.reporter.requested() is not None:
            raise Stopped(
                f"Stopped after {written} of {total} captions, which are kept. --skip_existing goes on from there."
            )

    def _tell_cuts(self) -> None:
        if self.cuts > SHOWN:
            sentence = f"{self.cuts} captions in all have more tokens than fit into their template."
            self.reporter.warning(Problem(None, sentence))
        if self.cuts_by_clip:
            sentence = (
                f"CLIP reads only the first {self.options.clip_max_length} tokens; "
                f"{counted(self.cuts_by_clip, 'caption')} of this run had more. Qwen2.5-VL reads on."
            )
            self.reporter.warning(Problem(None, sentence))


def _cut_warning(caption: Caption, tokens: Tokens, template: str) -> str:
    return (
        f"{caption.name}: the caption {short(caption.text)} has {tokens.kept + tokens.removed} tokens; only the first "
        f"{tokens.kept} fit into the {template} template. Shorten it, or the rest has no effect."
    )
