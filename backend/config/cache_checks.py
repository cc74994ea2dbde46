"""Everything that can be wrong with a request to cache latents, found before any weight is loaded, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import ImageColor

from backend.config.cache import CacheLatentsOptions, CacheOptions, DatasetOptions
from backend.config.checks import VAE_EXAMPLE, check_weight
from backend.config.dataset import DatasetConfig, check_sources, load_dataset_config
from backend.config.tasks import TASKS, default_weights
from backend.errors import Problem, Problems, UserError
from backend.files import check_writable


def check_cache_latents(options: CacheLatentsOptions, run_dir: str | Path | None = None) -> list[Problem]:
    """Every problem of `options` and of the dataset that they name; an empty list means that caching can start.

    Sources are not opened: what is wrong with a single one is reported when the dataset is looked at.
    """
    problems = [*check_dataset_options(options), *check_left_over(options), *_check_debug(options)]
    if options.debug_mode is None:
        path = options.vae or (default_weights(TASKS[options.task]).vae if options.task is not None else None)
        # A report compares with a VAE only if there is one.
        if path is not None or not options.check:
            problems += check_weight("vae", path, "vae", VAE_EXAMPLE)
    return list(dict.fromkeys(problems))


def check_dataset_options(options: DatasetOptions) -> list[Problem]:
    """Problems of the dataset configuration, of its folders, and of the sizes that are asked for."""
    problems: list[Problem] = []
    if options.nabla_stretch and not options.nabla_resize:
        problems.append(Problem("nabla_stretch", "belongs to --nabla_resize. Give that too, or leave it out."))
    if options.dataset_config is None:
        return [*problems, Problem("dataset_config", "is missing. Give the path of a dataset configuration (.toml).")]
    if not os.path.isfile(options.dataset_config):
        return [*problems, Problem("dataset_config", f"{options.dataset_config} does not exist. Check the path.")]
    try:
        config = load_dataset_config(options.dataset_config)
    except Problems as error:
        return [*problems, *error.problems]
    if not config.enabled:
        problems.append(Problem("dataset_config", "has no dataset that is enabled. Enable one (enabled = true)."))
    only_looks = not isinstance(options, CacheOptions) or options.check
    return [*problems, *check_sources(config), *([] if only_looks else _check_cache_folders(config))]


def check_left_over(options: CacheOptions) -> list[Problem]:
    """Contradictions about caches that no item needs."""
    if options.prune and options.keep_cache:
        return [Problem("prune", "contradicts --keep_cache. Leave one of them out.")]
    return []


def _check_cache_folders(config: DatasetConfig) -> list[Problem]:
    problems: list[Problem] = []
    for entry in config.enabled:
        # Without a key of its own the caches go beside the sources.
        field = f"datasets[{entry.index}].cache_directory"
        try:
            check_writable(entry.cache_directory / "cache_k5.safetensors", field)
        except UserError as error:
            problems += error.problems
    return problems


def _check_debug(options: CacheLatentsOptions) -> list[Problem]:
    problems: list[Problem] = []
    if options.debug_mode is not None:
        for name in ("check", "prune", "skip_existing"):
            if getattr(options, name):
                problems.append(Problem(name, "has no meaning with --debug_mode, which caches nothing. Leave it out."))
    if options.debug_mode != "console":
        for name in ("console_back", "console_num_images"):
            if getattr(options, name) is not None:
                problems.append(Problem(name, "belongs to --debug_mode console. Give that too, or leave it out."))
    if options.console_back is not None:
        try:
            ImageColor.getrgb(options.console_back)
        except ValueError:
            problems.append(
                Problem("console_back", f"{options.console_back!r} is no colour. Give a name such as black or #202020.")
            )
    return problems
