"""What is trained on: items grouped by shape, held-out ones apart, and their caches read as batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend.data.cache_files import LatentCache, TextCache, read_latent_cache, read_text_cache
from backend.data.cache_names import unconditional_cache_name
from backend.errors import Problem, UserError
from backend.training.order import Group, epoch_batches

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry


@dataclass(frozen=True)
class TrainingItem:
    """One clip or still with both caches.

    Attributes:
        name: file name of its latent cache, unique in its dataset.
        dataset: number of its dataset in the configuration, from 0.
        kind: "image" or "video", as its dataset; a clip of a single frame is a still all the same.
        frames: pixel frames. width, height: pixels.
    """

    name: str
    dataset: int
    kind: str
    latent_path: Path
    text_path: Path
    frames: int
    width: int
    height: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[F, H, W] of its latents."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


@dataclass(frozen=True)
class Batch:
    """Samples of one group; tensors are float32 on the CPU.

    Attributes:
        names, kinds: of the items.
        latents: [B, 16, F, H, W], scaled.
        latents_image: [B, 16, 2, H, W], first and last frame encoded as single images; None for text to video.
        text, text_mask: [B, S, D], padded on the right with zeros, and bool [B, S]; None: all are equally long.
        pooled: [B, P].
        empty_text, empty_pooled: [S0, D] and [P], the cached empty caption; None where no caption is ever dropped.
        caption_dropout: [B], how often each caption is replaced by the empty one.
        first_slot: how many samples of its epoch come before this batch.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    latents: Tensor
    latents_image: Tensor | None
    text: Tensor
    text_mask: Tensor | None
    pooled: Tensor
    empty_text: Tensor | None
    empty_pooled: Tensor | None
    caption_dropout: Tensor
    first_slot: int = 0

    @property
    def size(self) -> int:
        """How many samples there are."""
        return len(self.names)


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack texts [S_i, D] to [B, S, D], zeros on the right, and their bool mask [B, S] (T4, B10) if one is needed."""
    lengths = torch.tensor([len(text) for text in texts])
    padded = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    return padded, None if bool(mask.all()) else mask


class TrainingSet:
    """All items of a training; reading is safe from several threads."""

    def __init__(
        self,
        entries: Mapping[int, DatasetEntry],
        items: Sequence[TrainingItem],
        held_out: Sequence[TrainingItem],
        seed: int,
        *,
        image_to_video: bool,
        fingerprint: str,
        notices: Sequence[Problem] = (),
    ) -> None:
        """Made by `backend.training.dataset.load_training_set`.

        Args:
            entries: the datasets by their number in the configuration.
            seed: of the order of the batches.
            image_to_video: whether batches need single-image latents.
            fingerprint: of the content of all items.
            notices: what a person should know.
        """
        self.items = tuple(items)
        self.held_out = tuple(held_out)
        self.fingerprint = fingerprint
        self.notices = tuple(notices)
        self._all = (*self.items, *self.held_out)
        self._entries = dict(entries)
        self._seed = seed
        self._image_to_video = image_to_video
        self.groups = self._grouped()
        self.batches_per_epoch = sum(group.batches for group in self.groups)
        # A dataset's empty caption is needed in nearly every batch.
        self._read_empty = functools.lru_cache(maxsize=None)(self._read_empty_caption)

    @property
    def held_out_numbers(self) -> range:
        """The numbers by which `read` knows the held-out items, in the order of `held_out`."""
        return range(len(self.items), len(self._all))

    def batches(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of epoch `epoch` (from 0) as numbers of `items`, over all processes, in order."""
        return epoch_batches(self.groups, self._seed, epoch)

    def read(self, numbers: Sequence[int], first_slot: int = 0) -> Batch:
        """Read the items with these numbers, which must belong to one group.

        Raises:
            UserError: a cache is gone, damaged, or not what it was when the training began.
        """
        items = [self._all[number] for number in numbers]
        entry = self._entries[items[0].dataset]
        latents = [self._read_latents(item) for item in items]
        texts = [read_text_cache(item.text_path, entry.kind) for item in items]
        empty = self._read_empty(entry.index) if entry.caption_dropout else None
        for item, text in zip(items, texts, strict=True):
            _check_widths(item.text_path, text, empty or texts[0])
        text, mask = pad_texts([cache.text.float() for cache in texts])
        images = [cache.latents_image.float() for cache in latents if cache.latents_image is not None]
        return Batch(
            names=tuple(item.name for item in items),
            kinds=tuple(item.kind for item in items),
            latents=torch.stack([cache.latents.float() for cache in latents]),
            latents_image=torch.stack(images) if self._image_to_video else None,
            text=text,
            text_mask=mask,
            pooled=torch.stack([cache.pooled for cache in texts]),
            empty_text=empty.text.float() if empty else None,
            empty_pooled=empty.pooled if empty else None,
            caption_dropout=torch.full((len(items),), float(entry.caption_dropout)),
            first_slot=first_slot,
        )

    def facts(self) -> dict[str, Any]:
        """What is stored with LoRAs and states, without paths: counts, and for each dataset how it is used."""
        return {
            "items": len(self.items),
            "held_out": len(self.held_out),
            "samples_per_epoch": sum(group.shown for group in self.groups),
            "batches_per_epoch": self.batches_per_epoch,
            "fingerprint": self.fingerprint,
            "datasets": [self._dataset_facts(entry) for entry in self._entries.values()],
        }

    def _dataset_facts(self, entry: DatasetEntry) -> dict[str, Any]:
        groups = [group for group in self.groups if group.dataset == entry.index]
        return {
            "index": entry.index,
            "kind": entry.kind,
            "items": sum(item.dataset == entry.index for item in self.items),
            "held_out": sum(item.dataset == entry.index for item in self.held_out),
            "num_repeats": entry.num_repeats,
            "batch_size": entry.batch_size,
            "resolution": list(entry.resolution),
            "enable_bucket": entry.enable_bucket,
            "caption_dropout": entry.caption_dropout,
            "validation_split": entry.validation_split,
            "buckets": [
                {
                    "width": group.shape[2] * 8,
                    "height": group.shape[1] * 8,
                    "frames": group.shape[0] * 4 - 3,
                    "items": len(group.items),
                    "batches": group.batches,
                }
                for group in groups
            ],
        }

    def _grouped(self) -> tuple[Group, ...]:
        members: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
        for number, item in enumerate(self.items):
            members.setdefault((item.dataset, item.shape), []).append(number)
        return tuple(
            Group(dataset, shape, self._entries[dataset].batch_size, self._entries[dataset].num_repeats, tuple(numbers))
            for (dataset, shape), numbers in sorted(members.items())
        )

    def _read_latents(self, item: TrainingItem) -> LatentCache:
        cache = read_latent_cache(item.latent_path)
        if tuple(cache.latents.shape[1:]) != item.shape:
            raise UserError(
                f"{item.latent_path} holds latents of {list(cache.latents.shape[1:])} frames, rows and columns, not of "
                f"{list(item.shape)} as when the training began. Start the training again."
            )
        if self._image_to_video and (not cache.ours or cache.latents_image is None):
            raise UserError(f"{item.latent_path} holds no single-image latents of its first frame. Cache it again.")
        return cache

    def _read_empty_caption(self, dataset: int) -> TextCache:
        entry = self._entries[dataset]
        return read_text_cache(Path(entry.cache_directory) / unconditional_cache_name(entry.kind), entry.kind)


def _check_widths(path: Path, text: TextCache, other: TextCache) -> None:
    widths = [(cache.text.shape[1], cache.pooled.shape[0]) for cache in (text, other)]
    if widths[0] != widths[1]:
        raise UserError(
            f"{path} holds embeddings that are {widths[0][0]} and {widths[0][1]} wide, others of its dataset are "
            f"{widths[1][0]} and {widths[1][1]} wide. Cache all captions with the same encoders."
        )
