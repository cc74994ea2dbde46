"""Loads the dataset of a training: judges every cache first, refuses what cannot be trained with the reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backend.config.tasks import TASKS
from backend.data.buckets import Nabla
from backend.data.cache_facts import CacheFacts
from backend.data.ledger import DatasetLedger, LatentRow, TextRow, check_dataset
from backend.data.ledger_index import LedgerIndex
from backend.data.recipes import LatentRecipe
from backend.errors import Problem, Problems, UserError
from backend.files import fingerprint
from backend.training.training_set import Batch, TrainingItem, TrainingSet, pad_texts

if TYPE_CHECKING:
    from backend.config.dataset import DatasetConfig, DatasetEntry
    from backend.config.train_data import TrainDataOptions

__all__ = ["Batch", "TrainingItem", "TrainingSet", "load_training_set", "pad_texts"]

_FIRST_LAST_FRAMES = 9


def load_training_set(options: TrainDataOptions, config: DatasetConfig, seed: int) -> TrainingSet:
    """Check all caches of the enabled datasets and make a training set of them; nothing is cached here.

    The held-out part (`validation_split`) is chosen among the sources, never among clips of one, by a hash of their
    identity: the same sources in every run, whatever its seed.

    Args:
        seed: of the order of the batches.

    Raises:
        Problems: everything that is missing, stale or cannot be trained, each with its dataset.
    """
    image_to_video = options.task is not None and TASKS[options.task].mode == "i2v"
    problems: list[Problem] = []
    notices: list[Problem] = []
    items: list[TrainingItem] = []
    held_out: list[TrainingItem] = []
    content: list[Sequence[object]] = []
    for entry in config.enabled:
        where = f"datasets[{entry.index}]"
        try:
            ledger = check_dataset(entry, latents=LatentRecipe(nabla=_nabla(options)))
        except UserError as error:
            problems.append(Problem(where, error.message))
            continue
        troubles = [*_cache_troubles(entry, ledger, where), *_frame_troubles(options, ledger, image_to_video, where)]
        problems += troubles
        if troubles:
            continue
        kept = _held_out(entry, ledger)
        notices += _notices(entry, ledger, kept, image_to_video, where)
        rows = list(ledger.latents)
        made = [_item(entry, row) for row in rows]
        for row, item in zip(rows, made, strict=True):
            (held_out if row.item.source.identity in kept else items).append(item)
        content += _content(entry, ledger, kept)
    if not config.enabled:
        problems.append(Problem("dataset_config", "has no dataset that is enabled. Enable one."))
    if problems:
        raise Problems(problems)
    return TrainingSet(
        {entry.index: entry for entry in config.enabled},
        items,
        held_out,
        seed,
        image_to_video=image_to_video,
        fingerprint=_fingerprint(content),
        notices=notices,
    )


def _nabla(options: TrainDataOptions) -> Nabla:
    if not options.nabla_resize:
        return False
    return "stretch" if options.nabla_stretch else True


def _item(entry: DatasetEntry, row: LatentRow) -> TrainingItem:
    item, folder = row.item, Path(entry.cache_directory).absolute()
    return TrainingItem(
        name=item.latent_name,
        dataset=entry.index,
        kind=entry.kind,
        latent_path=folder / item.latent_name,
        text_path=folder / item.text_name,
        frames=item.frames,
        width=item.bucket.width,
        height=item.bucket.height,
    )


# --- what cannot be trained ---------------------------------------------------------------------------------------


def _cache_troubles(entry: DatasetEntry, ledger: DatasetLedger, where: str) -> list[Problem]:
    """Bad lines, missing captions, no items at all, and caches that cannot be used."""
    problems = list(ledger.problems)
    if not ledger.latents:
        why = ""
        if ledger.skipped:
            first = ledger.skipped[0]
            why = f" {len(ledger.skipped)} sources give none; the first, {first.source.identity}, {first.reason}."
        return [*problems, Problem(where, f"nothing to train on is in {entry.source}.{why} Check the dataset.")]
    if ledger.missing_captions:
        count, first = len(ledger.missing_captions), ledger.missing_captions[0].identity
        problems.append(
            Problem(
                where, f"{count} of {ledger.sources} sources have no caption, first {first}. Write it, or exclude them."
            )
        )
    # The empty caption is needed only where captions are dropped, and a source without one has been told of already.
    texts = [
        row for row in ledger.texts if (row.source.has_caption if row.source is not None else entry.caption_dropout > 0)
    ]
    unusable = [_unusable(ledger.latents, "latent caches"), _unusable(texts, "text caches")]
    sentences = [sentence for sentence in unusable if sentence]
    if sentences:
        advice = "Cache them, or add --cache_missing."
        problems.append(Problem(where, f"{'; '.join(sentences)}. {advice}"))
    return problems


def _unusable(rows: Iterable[LatentRow | TextRow], what: str) -> str | None:
    """A sentence's part such as "3 of 12 latent caches are missing, 1 is stale (caption: changed)"."""
    rows = list(rows)
    bad = [row for row in rows if not row.verdict.usable]
    if not bad:
        return None
    counts = Counter(row.verdict.state for row in bad)
    parts = []
    for state, count in counts.items():
        reason = next(row.verdict.reasons for row in bad if row.verdict.state == state)
        told = "" if state == "missing" or not reason else f" ({reason[0]})"
        subject = f"{count} of {len(rows)} {what}" if not parts else str(count)
        parts.append(f"{subject} {'is' if count == 1 else 'are'} {state}{told}")
    return ", ".join(parts)


def _frame_troubles(
    options: TrainDataOptions, ledger: DatasetLedger, image_to_video: bool, where: str
) -> list[Problem]:
    """What image to video cannot be trained on."""
    if not image_to_video:
        return []
    problems = []
    clips = [row for row in ledger.latents if row.item.frames > 1]
    foreign = sum(row.verdict.state == "foreign" for row in clips)
    if foreign:
        problems.append(
            Problem(
                where,
                f"{foreign} latent caches were written by another tool. What they hold as first and last frame are "
                "parts of the clip's own latents, not images encoded alone, which image to video is given. "
                "Cache these latents again.",
            )
        )
    stills = len(ledger.latents) - len(clips)
    if stills and options.i2v_stills == "refuse":
        problems.append(
            Problem(
                where, f"has {stills} stills, and --i2v_stills refuse is given. Disable it, or use --i2v_stills t2v."
            )
        )
    short = sum(row.item.frames < _FIRST_LAST_FRAMES for row in clips)
    if short and options.i2v_mode == "first_last":
        problems.append(
            Problem(
                where,
                f"{short} clips are so short that nothing is left between their first and last latent frame. "
                f"Give --i2v_mode first_last clips of {_FIRST_LAST_FRAMES} frames or more.",
            )
        )
    return problems


# --- held-out sources and what a person should know ---------------------------------------------------------------


def _held_out(entry: DatasetEntry, ledger: DatasetLedger) -> set[str]:
    """Identities of the sources that are kept for validation: at least one of two or more, and never all."""
    if not entry.validation_split:
        return set()
    identities = sorted({row.item.source.identity for row in ledger.latents}, key=_rank)
    count = max(1, round(entry.validation_split * len(identities)))
    return set(identities[: min(count, len(identities) - 1)])


def _rank(identity: str) -> tuple[str, str]:
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest(), identity


def _notices(
    entry: DatasetEntry, ledger: DatasetLedger, kept: set[str], image_to_video: bool, where: str
) -> list[Problem]:
    notices = []
    if ledger.skipped:
        first = ledger.skipped[0]
        notices.append(
            Problem(
                where,
                f"{len(ledger.skipped)} of {ledger.sources} sources are not trained; the first, "
                f"{first.source.identity}, {first.reason}.",
            )
        )
    foreign = sum(row.verdict.state == "foreign" for row in ledger.latents)
    if foreign:
        notices.append(
            Problem(
                where, f"{foreign} latent caches were written by another tool; their VAE and tiling cannot be compared."
            )
        )
    if entry.validation_split and not kept:
        notices.append(Problem(where, "has a single source, so that nothing of it is held out for validation."))
    if image_to_video and all(row.item.frames == 1 for row in ledger.latents):
        notices.append(Problem(where, "has stills only, which are trained as text to video (--i2v_stills)."))
    return notices


# --- fingerprint --------------------------------------------------------------------------------------------------


def _content(entry: DatasetEntry, ledger: DatasetLedger, kept: set[str]) -> list[Sequence[object]]:
    """For each item its name, whether it is held out, and what its caches say they were made of and how."""
    index = LedgerIndex(ledger.cache_directory)
    rows = list(ledger.latents)
    latents = index.cache_facts_of([row.item.latent_name for row in rows], "latent")
    texts = index.cache_facts_of(list(dict.fromkeys(row.item.text_name for row in rows)), "text")
    folder = Path(ledger.cache_directory)
    lines: list[Sequence[object]] = []
    for row in rows:
        name, text_name = row.item.latent_name, row.item.text_name
        lines.append(
            (
                entry.kind,
                name,
                row.item.source.identity in kept,
                _identity(folder / name, latents[name][1]),
                _identity(folder / text_name, texts[text_name][1]),
            )
        )
    return lines


def _identity(path: Path, facts: object) -> object:
    """What the content of a cache depends on; of a file that does not tell, a hash of the file."""
    if isinstance(facts, CacheFacts) and facts.ours:
        return sorted(facts.shared.items()), facts.source_hash, facts.caption_hash
    try:
        return fingerprint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}. Cache it again.") from error


def _fingerprint(lines: Iterable[Sequence[object]]) -> str:
    """16 hexadecimal digits for what the items consist of."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line).encode("ascii") + b"\n")
    return digest.hexdigest()[:16]
