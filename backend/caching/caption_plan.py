"""Which captions the datasets have, for which caches, and which of these need to be written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from backend.caching.share import Share
from backend.config.dataset import DatasetConfig, DatasetEntry
from backend.data.cache_facts import MISSING, ExpectedText, Verdict, judge_text
from backend.data.cache_names import text_cache_name, unconditional_cache_name
from backend.data.ledger_index import LedgerIndex
from backend.data.recipes import TextRecipe
from backend.data.scan import Source, read_caption, scan_dataset
from backend.errors import UserError

SHOWN = 20
"""Warnings of one sort that are told one by one; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One distinct text of one kind of dataset ("image" or "video", which stands for its template).

    Attributes:
        kind: kind of the datasets.
        text: prefix and caption; empty for the unconditional embedding, and for sources whose caption is empty.
        dataset: number of the first dataset that has it.
        name: the first source that has it, for people.
        paths: the caches that hold it.
    """

    kind: str
    text: str
    dataset: int
    name: str
    paths: list[str]


@dataclass
class Judged:
    """Which captions need to be encoded, each with those of its caches that are to be written.

    `states` counts the caches that were looked at, `reasons` why some of them are not valid, `refused` those that
    another tool wrote for videos.
    """

    captions: list[Caption] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def files(self) -> int:
        """How many caches are to be written."""
        return sum(len(caption.paths) for caption in self.captions)


@dataclass
class Collected:
    """All distinct captions, the empty ones first, and what a person should know about the sources."""

    captions: list[Caption] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def collect_captions(config: DatasetConfig) -> Collected:
    """All distinct captions of the enabled datasets in the order of their sources.

    No image and no video is opened. Sources without a caption that can be read are left out, with a warning.

    Raises:
        UserError: a folder or JSONL file cannot be read, or there is no caption at all.
    """
    captions: dict[tuple[str, str], Caption] = {}
    warnings: list[str] = []
    used: list[tuple[DatasetEntry, list[Source]]] = []
    for entry in config.enabled:
        scan = scan_dataset(entry)
        where = f"Dataset {entry.index + 1}"
        warnings += limited([f"{where}: {problem.message}" for problem in scan.problems])
        if not scan.sources:
            warnings.append(f"{where} has no sources in {entry.source}.")
            continue
        if scan.missing_captions:
            names = [source.identity for source in scan.missing_captions]
            warnings.append(
                f"{where}: {len(names)} of {counted(len(scan.sources), 'source')} without a caption; they get no text "
                f"cache ({listed(names)}). Write captions, or exclude them."
            )
        used.append((entry, scan.sources))
        path = os.path.join(entry.cache_directory, unconditional_cache_name(entry.kind))
        _add(captions, entry, "", "the empty caption", path)
    total = sum(len(sources) for _, sources in used)
    if not sum(_read_captions(entry, sources, captions, warnings) for entry, sources in used):
        raise UserError(
            f"None of the {total} sources has a caption that can be read. Put a text file beside each, or name their "
            "captions in a JSONL file."
            if total
            else "The datasets have no sources. Check their folders.",
            "dataset_config",
        )
    return Collected(list(captions.values()), warnings)


def _read_captions(
    entry: DatasetEntry, sources: Iterable[Source], captions: dict[tuple[str, str], Caption], warnings: list[str]
) -> int:
    """Add the captions of one dataset; returns how many sources have one."""
    unreadable: list[str] = []
    count = 0
    for source in sources:
        if not source.has_caption:
            continue
        try:
            text = read_caption(source, entry.caption_prefix)
        except UserError as error:
            unreadable.append(_plain(f"{error.message} {source.identity} gets no text cache."))
            continue
        count += 1
        _add(captions, entry, text, source.identity, os.path.join(entry.cache_directory, text_cache_name(source.name)))
    warnings += limited(unreadable)
    return count


def _add(captions: dict[tuple[str, str], Caption], entry: DatasetEntry, text: str, name: str, path: str) -> None:
    caption = captions.get((entry.kind, text))
    if caption is None:
        captions[entry.kind, text] = Caption(entry.kind, text, entry.index, _plain(name), [path])
    else:
        caption.paths.append(path)


def share_captions(captions: Sequence[Caption], share: Share) -> list[Caption]:
    """The captions of one of several processes; the empty ones belong to the first."""
    empty = [caption for caption in captions if not caption.text] if share.first else []
    return [*empty, *share.take([caption for caption in captions if caption.text])]


def judge_captions(captions: Iterable[Caption], recipe: TextRecipe) -> Judged:
    """Leave out the caches that are usable as they are: ours that are valid, and those of other tools that fit."""
    judged = Judged()
    # Headers that the ledger has read already are not read again.
    indexes: dict[str, LedgerIndex] = {}
    for caption in captions:
        expected = recipe.expected(caption.kind, caption.text)
        paths: list[str] = []
        for path in caption.paths:
            verdict = _judge(path, expected, indexes)
            judged.states[verdict.state] += 1
            if verdict.usable:
                continue
            paths.append(path)
            if verdict.state == "foreign":
                judged.refused.update(verdict.reasons)
            elif verdict.state == "stale":
                judged.reasons.update(verdict.reasons)
        if paths:
            judged.captions.append(replace(caption, paths=paths))
    return judged


def _judge(path: str, expected: ExpectedText, indexes: dict[str, LedgerIndex]) -> Verdict:
    if not os.path.lexists(path):
        return MISSING
    folder, name = os.path.split(path)
    if folder not in indexes:
        indexes[folder] = LedgerIndex(folder)
    facts, _ = indexes[folder].cache_facts(name, "text")
    return facts if isinstance(facts, Verdict) else judge_text(facts, expected)


def limited(sentences: Sequence[str]) -> list[str]:
    """Up to 20 sentences of one sort, then how many there are besides."""
    if len(sentences) <= SHOWN:
        return list(sentences)
    return [*sentences[:SHOWN], f"There are {len(sentences) - SHOWN} more warnings of this sort."]


def counted(number: int, noun: str) -> str:
    """Such as "1 cache" and "2 caches"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], shown: int = 5) -> str:
    """A few names, and how many there are besides."""
    text = ", ".join(_plain(name) for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def _plain(text: str) -> str:
    # Names that are not UTF-8 hold surrogates, which neither a terminal nor the journal can write.
    return text.encode("utf-8", "replace").decode("utf-8")
