"""The ledger: the state of every cache of a dataset, what is missing, what is left over, and how large it all is."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from backend.data.cache_facts import (
    MISSING,
    CacheFacts,
    Verdict,
    judge_latent,
    judge_shared_latent,
    judge_text,
    source_change,
)
from backend.data.cache_names import (
    is_unfinished,
    parse_latent_name,
    parse_text_name,
    unconditional_cache_name,
)
from backend.data.items import Item, Skipped, build_items
from backend.data.ledger_index import LedgerIndex
from backend.data.looking import FEW, Looks, Progress, look_at_all, look_here
from backend.data.pauses import no_collection
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.scan import Scan, Source, scan_dataset
from backend.data.stamps import Stamp, stamp_of, text_hash
from backend.errors import Problem, UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry
    from backend.data.watchdog import MediaReader

_NO_CAPTION = UserError("the source has no caption")
STATES = ("valid", "stale", "foreign", "broken", "missing")


class LatentRow(NamedTuple):
    """One item, the state of its latent cache and that file's size in bytes."""

    item: Item
    verdict: Verdict
    bytes: int


# What `LatentRow(...)` does, without the call of a Python function: there may be very many.
_MAKE_LATENT = functools.partial(tuple.__new__, LatentRow)


class TextRow(NamedTuple):
    """One source that has items, the state of its text cache and that file's size in bytes.

    `source` is None for the empty caption, which is cached once per dataset.
    """

    source: Source | None
    name: str
    verdict: Verdict
    bytes: int


_MAKE_TEXT = functools.partial(tuple.__new__, TextRow)


class Orphan(NamedTuple):
    """A cache file that belongs to no item; `why` is "no item" or "unfinished" (its writer was killed)."""

    name: str
    why: str
    stamp: Stamp


@dataclass
class DatasetLedger:
    """Everything about the caches of one dataset.

    `held` counts cache files of sources that could not be read: they may be needed again and are no orphans.
    `excluded` counts the sources that the configuration leaves out; their caches are orphans.
    """

    index: int
    kind: str
    cache_directory: str
    sources: int
    latents: list[LatentRow] = field(default_factory=list)
    texts: list[TextRow] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    missing_captions: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    held: int = 0
    excluded: int = 0

    @property
    def latent_states(self) -> dict[str, int]:
        """How many latent caches are in each state."""
        return _count(row.verdict for row in self.latents)

    @property
    def text_states(self) -> dict[str, int]:
        """How many text caches are in each state."""
        return _count(row.verdict for row in self.texts)

    @property
    def bytes(self) -> int:
        """Size of all caches that belong to items."""
        return sum(row.bytes for row in self.latents) + sum(row.bytes for row in self.texts)

    @property
    def orphan_bytes(self) -> int:
        """Size of all orphans."""
        return sum(orphan.stamp.size for orphan in self.orphans)

    @property
    def ready(self) -> bool:
        """Whether there is something to train on and all of it is usable."""
        rows = [row.verdict for row in self.latents] + [row.verdict for row in self.texts]
        return bool(self.latents) and not self.problems and all(verdict.usable for verdict in rows)


def check_dataset(
    entry: DatasetEntry,
    *,
    latents: LatentRecipe | None = None,
    text: TextRecipe | None = None,
    reader: MediaReader | None = None,
    on_progress: Progress | None = None,
) -> DatasetLedger:
    """Judge every cache of one dataset. Nothing is changed but the index in the cache folder.

    Without a recipe the caches are compared with the dataset alone (sources, captions, sizes, frames, templates), not
    with a VAE or encoders; for NABLA sizes give `LatentRecipe(nabla=...)`.

    Args:
        reader: probes sources that are new, in guarded processes. None: a few are probed here, many by all cores.
        on_progress: as for `look_at_all`, called with sources looked at and sources in all.

    Raises:
        UserError: the source folder, the JSONL file or the cache folder cannot be read.
    """
    recipe, text = latents or LatentRecipe(), text or TextRecipe()
    # One pause for all that is quick: after each, the collector looks through everything once.
    with no_collection():
        scan = scan_dataset(entry)
        index = LedgerIndex(os.path.abspath(os.fspath(entry.cache_directory)))
        if reader is None and on_progress is None and index.count_new(scan.sources) <= FEW:
            return _judged(entry, scan, index, look_here(scan.sources, index), recipe, text)
    looks = look_at_all(scan.sources, index=index, reader=reader, on_progress=on_progress)
    with no_collection():
        return _judged(entry, scan, index, looks, recipe, text)


def _judged(
    entry: DatasetEntry, scan: Scan, index: LedgerIndex, looks: Looks, recipe: LatentRecipe, text: TextRecipe
) -> DatasetLedger:
    folder = os.path.abspath(os.fspath(entry.cache_directory))
    present = _list_caches(folder)
    plan = build_items(entry, scan.sources, nabla=recipe.nabla, look=looks.look)
    ledger = DatasetLedger(
        entry.index,
        entry.kind,
        folder,
        len(scan.sources),
        skipped=plan.skipped,
        missing_captions=scan.missing_captions,
        problems=scan.problems,
        excluded=len(scan.excluded),
    )
    judge = _Judge(entry, folder, present, index, recipe, text)
    ledger.latents = judge.latents(plan.items)
    ledger.texts = judge.texts(plan.items)
    judge.find_predecessors(ledger.latents)
    _find_orphans(ledger, present)
    index.save()
    return ledger


def _list_caches(folder: str) -> set[str]:
    """Names of the files in a cache folder that are caches or the remains of one; none if there is no folder yet."""
    try:
        with os.scandir(folder) as entries:
            return {item.name for item in entries if item.name.endswith(".safetensors") and item.is_file()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"The cache folder {folder} cannot be read: {error.strerror or error}. Check it.") from error


class _Judge:
    """Judges the caches of one dataset; what many items share is judged once."""

    def __init__(
        self,
        entry: DatasetEntry,
        folder: str,
        present: set[str],
        index: LedgerIndex,
        latents: LatentRecipe,
        text: TextRecipe,
    ) -> None:
        self.entry, self.folder, self.present, self.index = entry, folder, present, index
        self.recipe, self.text_recipe = latents, text
        self.text_expected = text.expected(entry.kind, "")
        self._shared_verdicts: dict[tuple[object, ...], Verdict] = {}
        self._shared_texts: dict[tuple[object, ...], Verdict] = {}

    def latents(self, items: list[Item]) -> list[LatentRow]:
        """The rows of items, in their order."""
        present = self.present
        cached = self.index.cache_facts_of([item[4] for item in items if item[4] in present], "latent")
        rows: list[LatentRow] = []
        keep, judged = rows.append, self._shared_verdicts
        for item in items:
            # Taken apart at once: names of fields are looked up one by one, and there may be very many items.
            source, _, clip, bucket, name, _, stamp, cropped = item
            if name not in cached:
                keep(LatentRow(item, MISSING, 0))
                continue
            (size, _, _), facts = cached[name]
            if isinstance(facts, Verdict):
                keep(LatentRow(item, facts, size))
                continue
            ours, shared, source_size, source_mtime_ns, _, _ = facts
            # `shared` is one object for equal facts and lives as long as the index, so its identity stands for it.
            key = (id(shared), ours, clip, bucket, cropped)
            verdict = judged.get(key)
            if verdict is None:
                expected = self.recipe.expected(self.entry, item, stamp)
                verdict = judged[key] = judge_shared_latent(ours, shared, expected)
            if ours and (source_mtime_ns != stamp[1] or source_size != stamp[0]):
                changed = source_change(facts, source.location, stamp, self.index.content_hash)
                if changed is not None:
                    verdict = Verdict("stale", (*verdict.reasons, changed))
            keep(_MAKE_LATENT((item, verdict, size)))
        return rows

    def texts(self, items: list[Item]) -> list[TextRow]:
        """One row per source that has items, in their order, and one for the empty caption."""
        if not items:
            return []
        sources: list[Source] = []
        names: list[str] = []
        last = None
        for item in items:
            if item[0] is not last:
                last = item[0]
                sources.append(last)
                names.append(item[5])
        empty = unconditional_cache_name(self.entry.kind)
        cached = self.index.cache_facts_of([name for name in (*names, empty) if name in self.present], "text")
        captioned = [source for source in sources if source[4] is not None or source[5] is not None]
        hashes = iter(self.index.caption_hashes(captioned, self.entry.caption_prefix or ""))
        rows: list[TextRow] = []
        keep, judge = rows.append, self._text_verdict
        for source, name in zip(sources, names, strict=True):
            digest = next(hashes) if source[4] is not None or source[5] is not None else _NO_CAPTION
            if isinstance(digest, UserError):
                keep(TextRow(source, name, Verdict("missing", (digest.message,)), 0))
            elif name in cached:
                stamp, facts = cached[name]
                keep(_MAKE_TEXT((source, name, judge(facts, digest), stamp[0])))
            else:
                keep(TextRow(source, name, MISSING, 0))
        if empty in cached:
            stamp, facts = cached[empty]
            keep(TextRow(None, empty, judge(facts, text_hash("")), stamp.size))
        else:
            keep(TextRow(None, empty, MISSING, 0))
        return rows

    def _text_verdict(self, facts: CacheFacts | Verdict, digest: str) -> Verdict:
        if isinstance(facts, Verdict):
            return facts
        ours, shared, _, _, _, told = facts
        key = (id(shared), ours, told is None, told == digest)
        verdict = self._shared_texts.get(key)
        if verdict is None:
            expected = self.text_expected._replace(caption_hash=digest)
            verdict = self._shared_texts[key] = judge_text(facts, expected)
        return verdict

    def find_predecessors(self, rows: list[LatentRow]) -> None:
        """Call a missing cache stale when the same clip is there in another size: names hold the size.

        The old file stays an orphan: the new one gets another name.
        """
        missing = [number for number, row in enumerate(rows) if row.verdict is MISSING]
        if not missing:
            return
        wanted = {row.item.latent_name for row in rows}
        old: dict[tuple[str, int | None, int | None], str] = {}
        for name in sorted(self.present - wanted):
            parsed = parse_latent_name(name, self.entry.kind)
            if parsed is not None:
                old[(parsed.key, parsed.start, parsed.frames)] = name
        for number in missing:
            item = rows[number].item
            start, frames = (None, None) if item.clip is None else (item.clip.start, item.clip.frames)
            name = old.get((item.source.name, start, frames))
            facts = self.index.cache_facts(name, "latent")[0] if name is not None else None
            if isinstance(facts, CacheFacts):
                expected = self.recipe.expected(self.entry, item, item.stamp)
                verdict = judge_latent(facts, expected, self.index.content_hash)
                if verdict.state == "stale":
                    rows[number] = LatentRow(item, verdict, 0)


def _find_orphans(ledger: DatasetLedger, present: set[str]) -> None:
    """List the caches that no item needs, and the remains of killed writers."""
    needed = {row.item.latent_name for row in ledger.latents}
    needed.update(row.name for row in ledger.texts)
    # Broken sources may be repaired. Captions are cached without a look at the media, so sources without items have
    # texts too.
    held = {skipped.source.name for skipped in ledger.skipped if skipped.broken}
    waiting = {skipped.source.name for skipped in ledger.skipped if not skipped.broken}
    for name in sorted(present - needed):
        if is_unfinished(name):
            why = "unfinished"
        else:
            latent = parse_latent_name(name, ledger.kind)
            key = latent.key if latent is not None else parse_text_name(name)
            if key is None:
                continue
            if key in held:
                ledger.held += 1
                continue
            if latent is None and key in waiting:
                continue
            why = "no item"
        try:
            ledger.orphans.append(Orphan(name, why, stamp_of(os.path.join(ledger.cache_directory, name))))
        except OSError:
            continue  # It went away between the listing and now, which is what an orphan is asked to do.


def _count(verdicts: Iterable[Verdict]) -> dict[str, int]:
    found = Counter(verdict.state for verdict in verdicts)
    return {state: found.get(state, 0) for state in STATES}
