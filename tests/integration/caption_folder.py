"""Small datasets for the tests of text caches, and the command that caches them, run inside the test's process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
import torch
from PIL import Image
from safetensors import safe_open

from backend.config.tasks import DEMO_WEIGHTS
from backend.events import read_events
from backend.kandinsky5_cache_text_encoder_outputs import main
from tests.integration.command import Run

ENCODERS = (
    *("--text_encoder_qwen", str(DEMO_WEIGHTS / "text_encoder")),
    *("--text_encoder_clip", str(DEMO_WEIGHTS / "text_encoder_2")),
)
EMPTY = {"video": ".unconditional-video_k5_te.safetensors", "image": ".unconditional-image_k5_te.safetensors"}

Captions = Mapping[str, "str | bytes | None"]


def add_sources(folder: Path, kind: str, captions: Captions) -> None:
    """Sources called by the keys; images are real, videos are not: the command must never open them."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, caption in captions.items():
        if kind == "image":
            Image.new("RGB", (80, 60)).save(folder / f"{stem}.png")
        else:
            (folder / f"{stem}.mp4").write_bytes(b"no video at all")
        write_caption(folder / f"{stem}.txt", caption)


def write_caption(path: Path, caption: str | bytes | None) -> None:
    """Write, or for None remove, a caption file."""
    if caption is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(caption.encode("utf-8") if isinstance(caption, str) else caption)


def make_config(root: Path, *tables: dict[str, Any], name: str = "dataset.toml") -> Path:
    """A TOML (or by the name JSON) configuration with one dataset for each table, which has at least its `kind`."""
    datasets = []
    for number, table in enumerate(tables):
        keys = dict(table)
        kind, source = keys.pop("kind"), keys.pop("source", None)
        folder = root / (source or f"{kind}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        entry = {f"{kind}_directory": str(folder), "cache_directory": str(root / f"cache-{number}")}
        datasets.append(entry | {"caption_extension": ".txt", "resolution": [64, 64]} | keys)
    path = root / name
    document = {"datasets": datasets}
    path.write_text(json.dumps(document) if path.suffix == ".json" else tomlkit.dumps(document), encoding="utf-8")
    return path


def make_dataset(root: Path, videos: Captions | None = None, images: Captions | None = None, **keys: Any) -> Path:
    """One dataset of each kind that is given (caches in root/cache-0, root/cache-1); `keys` go into both tables."""
    tables = []
    for kind, captions in (("video", videos), ("image", images)):
        if captions is not None:
            add_sources(root / kind, kind, captions)
            tables.append({"kind": kind, "source": kind, **keys})
    return make_config(root, *tables)


def cache_text(config: Path | None, *words: str, encoders: tuple[str, ...] = ENCODERS) -> Run:
    """The command with the demo's encoders and a new run folder beside the configuration."""
    base = (config or Path(words[-1])).parent
    number = len([path for path in base.iterdir() if path.name.startswith("run-")])
    folder = base / f"run-{number}"
    stream = io.StringIO()
    given = [] if config is None else ["--dataset_config", str(config)]
    with contextlib.redirect_stderr(stream):
        code = main([*given, *encoders, *words, "--run_dir", str(folder)])
    records = [dict(record) for record in read_events(folder / "events.jsonl").records]
    return Run(code, records, stream.getvalue(), folder)


def read_all(folder: Path) -> dict[str, bytes]:
    """The caches in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


def read_cache(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata, read by the safetensors library."""
    with safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
        return {name: handle.get_tensor(name).clone() for name in names}, handle.metadata() or {}
