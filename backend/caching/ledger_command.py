"""What `--check` and `--prune` of both caching commands do: tell the state of the caches, move what is left over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backend.config.cache import CacheOptions
from backend.config.dataset import DatasetConfig
from backend.data.cache_names import TRASH_FOLDER, parse_text_name
from backend.data.latent_request import nabla_mode
from backend.data.ledger import DatasetLedger, Orphan, check_dataset
from backend.data.ledger_report import to_json, to_text
from backend.data.prune import Pruned, prune
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.errors import Problem, Problems, UserError
from backend.files import write_atomic
from backend.progress import Reporter

_SHOWN = 20
REPORT_FILE = "ledger.json"


def run_ledger(
    config: DatasetConfig,
    options: CacheOptions,
    reporter: Reporter,
    latents: LatentRecipe | None,
    text: TextRecipe | None,
    run_dir: Path | None,
) -> list[str]:
    """Report the state of every cache of the enabled datasets on standard output; nothing is encoded or moved.

    Caches are compared with the weights that the recipes name; what a recipe does not name is said and not compared.
    With `--prune` the report ends with what would be moved: see `prune_caches`. The run folder gets the report as
    ledger.json.

    Returns:
        The files that were written, relative to the run folder.

    Raises:
        Problems: a dataset cannot be read.
    """
    ledgers = _check_all(config, options, reporter, latents, text)
    document = to_json(ledgers)
    if options.report_format == "json":
        _print(document)
    else:
        _print(to_text(ledgers) + "\n" + _not_compared(latents, text))
    if options.prune:
        _announce_prune(_movable(ledgers, latents), reporter)
    if run_dir is None:
        return []
    write_atomic(run_dir / REPORT_FILE, document)
    return [REPORT_FILE]


def prune_caches(
    config: DatasetConfig,
    options: CacheOptions,
    reporter: Reporter,
    latents: LatentRecipe | None,
    text: TextRecipe | None,
    run_dir: Path | None,
) -> list[Pruned]:
    """Move the orphans of the enabled datasets to the trash of their cache folders, and say which and how large.

    Without a recipe of latents only caches of text and the remains of killed writers move: which latents are left over
    depends on sizes that the other command is not told. Nothing is deleted. Disabled datasets are left alone.

    Raises:
        Problems: a dataset could not be read completely, so nobody knows what is left over; nothing was moved.
    """
    ledgers = _movable(_check_all(config, options, reporter, latents, text), latents)
    results = prune(ledgers)
    for ledger, result in zip(ledgers, results, strict=True):
        where = f"Dataset {ledger.index + 1}"
        if result.trash is not None:
            reporter.phase("prune", f"{where}: {_files(result.moved, result.bytes)} moved to {result.trash}.")
        if result.left:
            reporter.warning(
                Problem("prune", f"{where}: {_names(result.left)} changed just now or may still be written, and stay.")
            )
    if not any(result.moved for result in results):
        reporter.phase("prune", "No cache is left over; nothing was moved.")
    if run_dir is not None:
        write_atomic(run_dir / REPORT_FILE, to_json(_check_all(config, options, reporter, latents, text)))
    return results


def _movable(ledgers: Sequence[DatasetLedger], latents: LatentRecipe | None) -> list[DatasetLedger]:
    """The ledgers with those orphans only that may be moved."""
    if latents is not None:
        return list(ledgers)
    return [replace(ledger, orphans=[orphan for orphan in ledger.orphans if _is_text(orphan)]) for ledger in ledgers]


def _is_text(orphan: Orphan) -> bool:
    return orphan.why == "unfinished" or parse_text_name(orphan.name) is not None


def _check_all(
    config: DatasetConfig,
    options: CacheOptions,
    reporter: Reporter,
    latents: LatentRecipe | None,
    text: TextRecipe | None,
) -> list[DatasetLedger]:
    recipe = latents or LatentRecipe(nabla=nabla_mode(options))
    ledgers: list[DatasetLedger] = []
    problems: list[Problem] = []
    for entry in config.enabled:
        reporter.phase("check", f"Checking the caches of dataset {entry.index + 1} in {entry.cache_directory}")
        try:
            ledgers.append(check_dataset(entry, latents=recipe, text=text))
        except UserError as error:
            problems += error.problems
    if problems:
        raise Problems(problems)
    return ledgers


def _announce_prune(ledgers: Sequence[DatasetLedger], reporter: Reporter) -> None:
    for ledger in ledgers:
        names = [orphan.name for orphan in ledger.orphans]
        trash = Path(ledger.cache_directory) / TRASH_FOLDER
        if names:
            message = f"Without --check these would be moved to {trash}: {_files(names, ledger.orphan_bytes)}."
        else:
            message = f"Without --check nothing would be moved out of {ledger.cache_directory}."
        reporter.phase("prune", message)


def _not_compared(latents: LatentRecipe | None, text: TextRecipe | None) -> str:
    """One line for the weights that nobody named."""
    missing = [
        label
        for label, named in (
            ("the VAE", latents is not None and latents.vae),
            ("Qwen2.5-VL", text is not None and text.qwen),
            ("CLIP", text is not None and text.clip),
        )
        if not named
    ]
    return f"Not compared, because the command does not name them: {', '.join(missing)}.\n" if missing else ""


def _files(names: Sequence[str], size: int) -> str:
    count = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"{count} of {size / 1e6:.1f} MB together ({_names(names)})"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(name.encode("utf-8", "replace").decode("utf-8") for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _print(text: str) -> None:
    sys.stdout.write(text.encode("utf-8", "replace").decode("utf-8"))
    sys.stdout.flush()
