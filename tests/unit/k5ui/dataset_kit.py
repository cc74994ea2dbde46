"""A workspace with small datasets, its routes and its verbs, for the tests of the Dataset tab."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from k5ui.api import router
from k5ui.datasets.encoding import write_mp4
from k5ui.datasets.verbs import dataset_verbs
from k5ui.services import Services

WAIT = 60.0


def write_clip(path: Path, frames: int = 20, size: tuple[int, int] = (64, 48), fps: int = 24, step: int = 8) -> None:
    """A grey clip whose frame n has the level 20 + step * n, so that its frames can be told apart."""
    width, height = size
    levels = [20 + step * number for number in range(frames)]
    write_mp4(path, [numpy.full((height, width, 3), level, numpy.uint8) for level in levels], fps, crf=8)


def write_image(path: Path, size: tuple[int, int] = (80, 60), colour: tuple[int, int, int] = (200, 30, 30)) -> None:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def clip_folder(folder: Path, count: int = 3) -> Path:
    """A folder of clips with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_clip(folder / f"clip{number}.mp4")
        (folder / f"clip{number}.txt").write_text(f"a grey card, take {number}\n", encoding="utf-8")
    return folder


@dataclass
class Desk:
    """The services with their routes and verbs."""

    services: Services
    client: TestClient
    verbs: dict[str, Callable[[Any], dict[str, Any]]]

    def get(self, route: str, /, status: int = 200, **query: Any) -> Any:
        """The JSON of a route below /api."""
        answer = self.client.get(f"/api/{route}", params=query)
        assert answer.status_code == status, answer.text
        return answer.json()

    def call(self, name: str, *arguments: Any) -> dict[str, Any]:
        """Call a verb with a JSON array."""
        return self.verbs[name](list(arguments))

    def done(self, name: str, *arguments: Any) -> dict[str, Any]:
        """Call a verb that must not answer trouble."""
        answer = self.call(name, *arguments)
        assert "error" not in answer, answer
        assert "problems" not in answer, answer
        return answer

    def new(self, folder: Path, name: str | None = None) -> str:
        """Make a dataset of a folder and wait until it was looked at."""
        dataset = self.done("new_dataset", str(folder), name)["id"]
        self.settle(dataset)
        return dataset

    def settle(self, dataset: str) -> dict[str, Any]:
        """The dataset once no look at it goes on."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            page = self.get(f"datasets/{dataset}")
            if page["scanned"] and page["scanning"] is None:
                return page
            time.sleep(0.02)
        raise AssertionError("The look at the dataset does not end.")

    def items(self, dataset: str, **query: Any) -> list[dict[str, Any]]:
        """The items of one page."""
        return self.get(f"datasets/{dataset}/items", **query)["items"]

    def until(self, dataset: str, test: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Ask as a page does until the dataset looks as expected."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            page = self.get(f"datasets/{dataset}")
            if test(page):
                return page
            time.sleep(0.1)
        raise AssertionError(f"The dataset never became so; it is {page['entries']}")


def open_desk(workspace: Path, roots: tuple[Path, ...] = (), exposed: bool = False) -> Desk:
    """A desk on a workspace; close `desk.services` at the end."""
    services = Services(workspace, roots, exposed)
    application = FastAPI()
    application.include_router(router(services))
    client = TestClient(application)
    # The first request builds the routes, with warnings switched off for a moment; readers of images in other threads
    # do the same, and Python keeps these switches for the whole process.
    client.get("/api/nothing")
    return Desk(services, client, {verb.__name__: verb for verb in dataset_verbs(services)})
