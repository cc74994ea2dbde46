"""What an app that lets other machines in refuses to train with, besides paths outside of its roots.

A training can name code (classes of optimizers and schedules by dotted path), files inside files (images in a prompt
file, folders in a tracker's configuration) and pieces of paths. On the loopback interface all of these are the person's
own business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from backend.config.options import load_toml
from backend.config.prompts import read_prompt_file
from backend.config.train import TrainOptions
from backend.errors import Problem, Problems, UserError
from k5ui.roots import Roots

_KNOWN_CLASSES = frozenset(
    {
        "bitsandbytes.optim.AdamW8bit",
        "prodigyopt.Prodigy",
        "schedulefree.AdamWScheduleFree",
        "schedulefree.RAdamScheduleFree",
        "schedulefree.SGDScheduleFree",
        "transformers.Adafactor",
        "transformers.optimization.Adafactor",
    }
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_TORCH_CLASS = re.compile(r"torch\.optim\.(lr_scheduler\.)?[A-Z]\w*")
_NAME_PARTS = ("log_prefix", "log_tracker_name", "wandb_run_name")
_IMAGES = ("image", "image_last")


def refusals(options: TrainOptions, roots: Roots) -> list[Problem]:
    """Every problem that only an exposed app has with `options`; their own paths are checked already."""
    if not roots.exposed:
        return []
    problems = [
        Problem(field, f"{value[:80]} is code of this machine, which others may not run. Use a class of torch.optim.")
        for field in ("optimizer_type", "lr_scheduler_type")
        if (value := getattr(options, field)) is not None and not _is_known_class(value)
    ]
    for field in _NAME_PARTS:
        value = getattr(options, field)
        if value is not None and (os.path.basename(value) != value or value in (os.curdir, os.pardir) or "\\" in value):
            problems.append(Problem(field, f"{value[:80]!r} is no plain name. Use letters, digits, - and _."))
    if options.sample_prompts is not None:
        problems += _images_outside(options.sample_prompts, roots)
    if options.log_tracker_config is not None:
        problems += _folders_outside(options.log_tracker_config, roots)
    return problems


def _is_known_class(name: str) -> bool:
    plain = name.strip()
    return bool(_NAME.fullmatch(plain) or _TORCH_CLASS.fullmatch(plain)) or plain in _KNOWN_CLASSES


def _images_outside(prompt_file: str, roots: Roots) -> list[Problem]:
    try:
        entries, _ = read_prompt_file(prompt_file)
    except UserError as error:
        return [Problem("sample_prompts", problem.message) for problem in error.problems]
    problems = []
    for place, overrides in entries:
        for name in _IMAGES:
            path = overrides.get(name)
            if isinstance(path, str):
                try:
                    roots.absolute(path)
                except UserError as error:
                    problems.append(Problem("sample_prompts", f"{place}: {error.message}"))
    return problems


def _folders_outside(path: str, roots: Roots) -> list[Problem]:
    """Trackers take folders as arguments and create them: no text in their file may be a path that leads out."""
    field = "log_tracker_config"
    try:
        values = load_toml(path, field)
    except Problems as error:
        return list(error.problems)
    for text in _texts(values):
        looks_like_path = os.path.isabs(os.path.expanduser(text)) or os.pardir in text.replace("\\", "/").split("/")
        if looks_like_path and not roots.allows(os.path.expanduser(text)):
            return [Problem(field, f"names {text[:80]!r}, which lies outside the folders of this app. Remove it.")]
    return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
