"""A workspace with a dataset of stills and its caches, for the tests of the Caching tab; nothing here needs torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from PIL import Image
from safetensors.numpy import save_file

from backend.config.dataset import load_dataset_config
from backend.data.cache_names import unconditional_cache_name
from backend.data.items import build_items
from backend.data.latent_request import latent_recipe
from backend.data.scan import read_caption, scan_dataset
from backend.data.stamps import content_hash
from backend.data.text_request import text_recipe
from backend.jobs.store import Run
from k5ui.caching.request import Wanted, latent_options, text_options
from k5ui.caching_api import caching_verbs
from k5ui.datasets.keys import dataset_id
from k5ui.services import Services

SECONDS = 30.0


class Studio:
    """Services with one dataset, its page and its verbs."""

    def __init__(self, workspace: Path, pictures: int = 4, exposed: bool = False) -> None:
        self.services = Services(workspace, exposed=exposed)
        self.source, self.cache = workspace / "pictures", workspace / "cached"
        for number in range(pictures):
            self.add(f"{number}.png", f"picture {number}", grey=40 * number)
        self.config = workspace / "datasets" / "stills.toml"
        self.config.parent.mkdir(exist_ok=True)
        self.write_config()
        self.id = dataset_id(self.config)
        self.verbs: dict[str, Callable[[Any], dict[str, Any]]] = {
            verb.__name__: verb for verb in caching_verbs(self.services)
        }

    def write_config(self, **general: Any) -> None:
        """The configuration, with more keys of [general]."""
        keys = {"resolution": [64, 64], "caption_extension": ".txt"} | general
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
        table = f"[[datasets]]\nimage_directory = '{self.source}'\ncache_directory = '{self.cache}'\n"
        self.config.write_text(f"[general]\n{lines}\n\n{table}", "utf-8")

    def add(self, name: str, caption: str | None, grey: int = 90) -> Path:
        """A still, with its caption."""
        self.source.mkdir(exist_ok=True)
        path = self.source / name
        Image.new("RGB", (80, 60), (grey, grey, grey)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, "utf-8")
        return path

    def write_caches(self) -> None:
        """Valid caches of everything, for the demo model."""
        form = Wanted({"task": "k5-demo-t2v"})
        latents = latent_recipe(latent_options(form, self.config, self.services.settings))
        text = text_recipe(text_options(form, self.config, self.services.settings))
        (entry,) = load_dataset_config(self.config).datasets
        self.cache.mkdir(exist_ok=True)
        for item in build_items(entry, scan_dataset(entry).sources).items:
            size = (item.bucket.height // 8, item.bucket.width // 8)
            tensors = {
                f"latents_1x{size[0]}x{size[1]}_float32": numpy.zeros((16, 1, *size), numpy.float32),
                f"latents_image_2x{size[0]}x{size[1]}_float32": numpy.zeros((16, 2, *size), numpy.float32),
            }
            metadata = latents.metadata(entry, item, item.stamp, content_hash(item.source.location))
            save_file(tensors, self.cache / item.latent_name, metadata | {"vae_dtype": "float32"})
            self._text(item.text_name, text.metadata(entry.kind, read_caption(item.source)))
        self._text(unconditional_cache_name(entry.kind), text.metadata(entry.kind, ""))

    def _text(self, name: str, metadata: dict[str, str]) -> None:
        tensors = {
            "varlen_text_embeds_float32": numpy.zeros((3, 8), numpy.float32),
            "pooled_embed_float32": numpy.zeros((4,), numpy.float32),
        }
        save_file(tensors, self.cache / name, metadata | {"text_dtype": "float32"})

    def ask(self, verb: str, *arguments: Any) -> dict[str, Any]:
        """What a verb answers."""
        return self.verbs[verb](list(arguments))

    def page(self) -> dict[str, Any]:
        """The page as it is."""
        return self.services.caching.page(self.id)

    def checked(self, what: Callable[[dict[str, Any]], Any] = lambda page: True) -> dict[str, Any]:
        """The page after a check, as soon as `what` is true of it."""
        self.services.caching.check(self.id)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            page = self.page()
            if not page["checking"] and page["checked"] and what(page):
                return page
            time.sleep(0.02)
        raise AssertionError(f"Not within {SECONDS} s: {json.dumps(self.page())[:2000]}")

    def entry(self) -> dict[str, Any]:
        """The sheet of the only table after a check."""
        return self.checked()["entries"][0]

    def run(self, run_id: str) -> Run:
        """A run."""
        return self.services.store.get(run_id)


def write_journal(run: Run, *records: tuple[str, float, dict[str, Any]]) -> None:
    """A journal of (type, seconds since the start, fields), begun a minute ago."""
    began = time.time() - 60
    lines = [
        json.dumps({"v": 1, "seq": number, "t": began + moment, "type": kind, **fields})
        for number, (kind, moment, fields) in enumerate(records, 1)
    ]
    (run.folder / "events.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def end_run(run: Run, exit_code: int = 0) -> None:
    """Lay the run out as one that was started and has ended."""
    (run.folder / "started.json").write_text("{}", "utf-8")
    (run.folder / "result.json").write_text(json.dumps({"exit_code": exit_code, "ended": time.time()}), "utf-8")
