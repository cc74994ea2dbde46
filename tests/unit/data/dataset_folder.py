"""Small datasets on disk for the tests of sources, caches and ledgers, and a second reader of cache names."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import tomlkit
import torch
from PIL import Image

from backend.config.dataset import DatasetEntry, load_dataset_config
from backend.data.cache_files import write_latent_cache, write_text_cache
from backend.data.items import Item, MediaFacts, source_stamp
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.scan import Source, read_caption
from backend.data.stamps import Stamp, content_hash

LATENTS = LatentRecipe(vae="vae-1", vae_dtype="float32", posterior="mode")
TEXT = TextRecipe(qwen="qwen-1", clip="clip-1", text_dtype="bfloat16")


def make_entry(folder: Path, kind: str = "image", **keys: object) -> DatasetEntry:
    """One dataset in `folder`/source, or in a JSONL file if `jsonl` names one, loaded from a real TOML file."""
    (folder / "source").mkdir(parents=True, exist_ok=True)
    jsonl = keys.pop("jsonl", None)
    source = {f"{kind}_jsonl_file": str(jsonl)} if jsonl else {f"{kind}_directory": str(folder / "source")}
    table: dict[str, object] = {**source, "cache_directory": str(folder / "cache"), "resolution": [64, 48]}
    if not jsonl:
        table["caption_extension"] = ".txt"
    if kind == "video":
        table |= {"target_frames": [5]}
    path = folder / "dataset.toml"
    path.write_text(tomlkit.dumps({"datasets": [table | keys]}), encoding="utf-8")
    return load_dataset_config(path).datasets[0]


def add_image(path: Path, size: tuple[int, int] = (80, 60), caption: str | None = "a picture", grey: int = 90) -> Path:
    """A small PNG with its caption file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path, "PNG")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def add_video(path: Path, facts: str = "80 60 9 24", caption: str | None = "a clip") -> Path:
    """Not a video: a text that says what one would be (width, height, frames, rate), for `look_at_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(facts, encoding="utf-8")
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def look_at_text(source: Source) -> tuple[Stamp, MediaFacts]:
    """Stands for `backend.data.items.look_at` where only names, counts and stamps matter."""
    width, height, frames, rate = (float(word) for word in source.path.read_text(encoding="utf-8").split()[:4])
    return source_stamp(source), MediaFacts(int(width), int(height), int(frames), rate, frames / rate, False)


def latent_tensors(item: Item, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random latents and first and last frame of the right shapes for an item."""
    generator = torch.Generator().manual_seed(seed)
    height, width = item.bucket.height // 8, item.bucket.width // 8
    clip = torch.randn(16, (item.frames - 1) // 4 + 1, height, width, generator=generator)
    return clip, torch.randn(16, 2, height, width, generator=generator)


def cache_item(entry: DatasetEntry, item: Item, recipe: LatentRecipe = LATENTS, text: TextRecipe = TEXT) -> None:
    """Write both caches of an item, as the caching commands do."""
    folder = Path(entry.cache_directory)
    metadata = recipe.metadata(entry, item, item.stamp, content_hash(item.source.location))
    write_latent_cache(folder / item.latent_name, *latent_tensors(item), metadata)
    if item.source.has_caption:
        caption = read_caption(item.source, entry.caption_prefix or "")
        cache_text(folder / item.text_name, entry.kind, caption, text)


def cache_text(path: Path, kind: str, caption: str, recipe: TextRecipe = TEXT) -> None:
    """Write a text cache with made-up numbers."""
    text = torch.full((len(caption) % 7 + 1, 24), 0.5, dtype=torch.bfloat16)
    write_text_cache(path, text, torch.full((12,), 0.25), recipe.metadata(kind, caption))


def raw_cache(path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> Path:
    """A safetensors file of zeros (BOOL: ones) with a header of its own, as another tool would write it."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape) in tensors.items():
        size = {"BOOL": 1, "F16": 2, "BF16": 2, "F32": 4}[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += (b"\1" if dtype == "BOOL" else b"\0") * size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def foreign_latent(path: Path, shape: tuple[int, int, int], frames: int | None, dtype: str = "F16") -> Path:
    """A latent cache with the names and the metadata that other tools write; `shape` is F, H, W of the latents."""
    name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype]
    tensors = {
        f"latents_{'x'.join(map(str, shape))}_{name}": (dtype, [16, *shape]),
        f"latents_image_2x{shape[1]}x{shape[2]}_{name}": (dtype, [16, 2, *shape[1:]]),
    }
    metadata = {"architecture": "kandinsky5", "width": "80", "height": "60", "format_version": "1.0.1"}
    return raw_cache(path, tensors, metadata | ({} if frames is None else {"frame_count": str(frames)}))


def foreign_text(path: Path, caption: str, tokens: int = 3) -> Path:
    """A text cache with the names and the metadata that other tools write."""
    tensors = {
        "text_embeds_bfloat16": ("BF16", [tokens, 24]),
        "pooled_embed_float32": ("F32", [12]),
        "attention_mask": ("BOOL", [tokens]),
    }
    metadata = {"architecture": "kandinsky5", "caption1": caption, "format_version": "1.0.1"}
    return raw_cache(path, tensors, metadata)


def read_name_as_others(name: str, video: bool) -> tuple[str, tuple[int, int], tuple[int, int] | None]:
    """(key, (width, height), (start, frames) of a clip) as other tools do: split at "_", read from the right."""
    stem, ending = os.path.splitext(name)
    words = stem.split("_")
    assert ending == ".safetensors"
    assert words[-1] == "k5"
    width, height = words[-2].split("x")
    if not video:
        return "_".join(words[:-2]), (int(width), int(height)), None
    start, frames = words[-3].split("-")
    return "_".join(words[:-3]), (int(width), int(height)), (int(start), int(frames))
