"""What the folder chooser shows: folders inside a folder, with how much there is to train on, and dataset files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from backend.config.tasks import DEMO_WEIGHTS
from backend.data.formats import kind_of
from backend.errors import UserError
from k5ui.datasets.known import SUFFIXES
from k5ui.datasets.pages import printable
from k5ui.roots import Roots

MAX_COUNTED = 1000
MAX_FOLDERS = 500
MAX_FILES = 200
_SECONDS = 0.25


def browse(path: str | None, workspace: Path, roots: Roots) -> dict[str, Any]:
    """The visible folders of a folder, by name, and the .toml and .json files in it.

    Counts of images and videos stop at 1000 and are null once a quarter of a second has gone into them. `places` are
    where one may start: the workspace and the home folder, or the roots of an exposed app.

    Raises:
        UserError: no such folder, or one outside of the roots.
    """
    places = _places(workspace, roots)
    folder = Path(roots.absolute(path, "path")) if path else places[0]
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder that exists.", "path")
    deadline = time.monotonic() + _SECONDS
    folders, files = _list(folder)
    own = _count(folder, float("inf")) or (0, 0)
    shown = []
    for child in folders[:MAX_FOLDERS]:
        full = folder / child
        if roots.exposed and not roots.allows(full):
            continue
        counts = _count(full, deadline)
        images, videos = counts if counts is not None else (None, None)
        shown.append({"name": printable(child), "path": os.fspath(full), "images": images, "videos": videos})
    parent = folder.parent
    up = parent != folder and (not roots.exposed or roots.allows(parent))
    return {
        "path": os.fspath(folder),
        "parent": os.fspath(parent) if up else None,
        "images": own[0],
        "videos": own[1],
        "folders": shown,
        "files": [printable(name) for name in files[:MAX_FILES]],
        "more": max(0, len(folders) - MAX_FOLDERS),
        "places": [os.fspath(place) for place in places],
    }


def _places(workspace: Path, roots: Roots) -> list[Path]:
    if roots.exposed:
        # Two of the roots are the app's own: the workspace, and the weights of the demo, where nobody keeps clips.
        own = (workspace.resolve(), Path(DEMO_WEIGHTS).resolve())
        return [*(folder for folder in roots.folders if folder.is_dir() and folder not in own), workspace]
    home = Path.home()
    return [home, workspace] if home.is_dir() else [workspace]


def _list(folder: Path) -> tuple[list[str], list[str]]:
    try:
        with os.scandir(folder) as items:
            visible = [item for item in items if not item.name.startswith(".")]
            folders = [item.name for item in visible if item.is_dir()]
            files = [item.name for item in visible if item.name.lower().endswith(SUFFIXES) and item.is_file()]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.", "path") from error
    return sorted(folders, key=str.lower), sorted(files, key=str.lower)


def _count(folder: Path, deadline: float) -> tuple[int, int] | None:
    """(images, videos) directly in a folder, at most 1000 together; None when there was no time."""
    if time.monotonic() > deadline:
        return None
    counts = {"image": 0, "video": 0}
    try:
        with os.scandir(folder) as items:
            for seen, item in enumerate(items):
                kind = kind_of(item.name)
                if kind is not None and not item.name.startswith("."):
                    counts[kind] += 1
                if sum(counts.values()) >= MAX_COUNTED or seen > 20 * MAX_COUNTED:
                    break
    except OSError:
        return None
    return counts["image"], counts["video"]
