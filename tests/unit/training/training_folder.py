"""Cached datasets on disk for tests of training: real cache files of random numbers, sources that nobody decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.data import ledger_index
from backend.data.cache_files import write_latent_cache, write_text_cache
from backend.data.cache_names import unconditional_cache_name
from backend.data.items import Item, MediaFacts, build_items, look_at
from backend.data.scan import Source, read_caption, scan_dataset
from backend.data.stamps import Stamp, content_hash
from backend.training.draws import seed_of
from tests.unit.data.dataset_folder import LATENTS, TEXT, add_image, add_video, look_at_text, make_entry

TEXT_DIM, POOLED_DIM = 24, 12


def text_tensors(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A made-up embedding that depends on the caption, a token for each word and the end."""
    random = torch.Generator().manual_seed(seed_of(caption))
    text = torch.randn(len(caption.split()) + 1, TEXT_DIM, generator=random).bfloat16()
    return text, torch.randn(POOLED_DIM, generator=random)


def latent_tensors(name: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up latents [16, F, H, W] and single images [16, 2, H, W] that depend on the item's name."""
    random = torch.Generator().manual_seed(seed_of(name))
    return torch.randn(16, *shape, generator=random), torch.randn(16, 2, *shape[1:], generator=random)


def cache_everything(entry: DatasetEntry) -> list[Item]:
    """Write all caches of a dataset, as the caching commands name and describe them."""
    folder = Path(entry.cache_directory)
    items = build_items(entry, scan_dataset(entry).sources, look=_look).items
    for item in items:
        shape = (item.frames - 1) // 4 + 1, item.bucket.height // 8, item.bucket.width // 8
        described = LATENTS.metadata(entry, item, item.stamp, content_hash(item.source.location))
        write_latent_cache(folder / item.latent_name, *latent_tensors(item.latent_name, shape), described)
        caption = read_caption(item.source, entry.caption_prefix)
        write_text_cache(folder / item.text_name, *text_tensors(caption), TEXT.metadata(entry.kind, caption))
    empty = folder / unconditional_cache_name(entry.kind)
    write_text_cache(empty, *text_tensors(""), TEXT.metadata(entry.kind, ""))
    return items


def clips(folder: Path, facts: Mapping[str, str], **keys: object) -> DatasetEntry:
    """A cached video dataset of sources "name: width height frames rate"; the caption of each is its name, repeated."""
    entry = make_entry(folder, "video", **keys)
    for number, (name, fact) in enumerate(facts.items()):
        add_video(folder / "source" / f"{name}.mp4", fact, caption=" ".join([name] * (number % 4 + 1)))
    cache_everything(entry)
    return entry


def stills(folder: Path, count: int, **keys: object) -> DatasetEntry:
    """A cached image dataset."""
    entry = make_entry(folder, "image", **keys)
    for number in range(count):
        add_image(folder / "source" / f"{number}.png", grey=number, caption=f"picture {number}")
    cache_everything(entry)
    return entry


def together(*entries: DatasetEntry) -> DatasetConfig:
    """One configuration of several datasets, numbered in this order."""
    return DatasetConfig(tuple(replace(entry, index=number) for number, entry in enumerate(entries)), ())


@pytest.fixture
def videos_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of video datasets are texts that say what they would be, so that nothing has to be encoded."""
    monkeypatch.setattr(ledger_index, "look_at", _look)


def _look(source: Source) -> tuple[Stamp, MediaFacts]:
    return look_at_text(source) if source.kind == "video" else look_at(source)
