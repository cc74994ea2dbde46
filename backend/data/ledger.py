"""The ledger: the state of every cache of a dataset, what is missing, what is left over, and how large it all is."""

from __future__ import annotations

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
from backend.data.items import Item, Look, Skipped, build_items
from backend.data.ledger_index import LedgerIndex
from backend.data.looking import FEW, Progress, look_at_all
from backend.data.pauses import no_collection
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.scan import Scan, Source, scan_dataset
from backend.data.stamps import Stamp, stamp_of, text_hash
from backend.errors import Problem, UserError

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry
    from backend.data.watchdog import MediaReader

STATES = ("valid", "stale", "foreign", "broken", "missing")


class LatentRow(NamedTuple):
    """One item, the state of its latent cache and that file's size in bytes."""

    item: Item
    verdict: Verdict
    bytes: int


class TextRow(NamedTuple):
    """One source that has items, the state of its text cache and that file's size in bytes.

    `source` is None for the empty caption, which is cached once per dataset.
    """

    source: Source | None
    name: str
    verdict: Verdict
    bytes: int


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
            return _judged(entry, scan, index, index.look, recipe, text)
    looks = look_at_all(scan.sources, index=index, reader=reader, on_progress=on_progress)
    with no_collection():
        return _judged(entry, scan, index, looks.look, recipe, text)


def _judged(
    entry: DatasetEntry, scan: Scan, index: LedgerIndex, look: Look, recipe: LatentRecipe, text: TextRecipe
) -> DatasetLedger:
    folder = os.path.abspath(os.fspath(entry.cache_directory))
    present = _list_caches(folder)
    plan = build_items(entry, scan.sources, nabla=recipe.nabla, look=look)
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
    ledger.latents = [judge.latent(item) for item in plan.items]
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

    def latent(self, item: Item) -> LatentRow:
        """The row of one item."""
        if item.latent_name not in self.present:
            return LatentRow(item, MISSING, 0)
        facts, size = self.index.cache_facts(item.latent_name, "latent")
        if isinstance(facts, Verdict):
            return LatentRow(item, facts, size)
        # `facts.shared` is one object for equal facts and lives as long as the index, so its identity stands for it.
        key = (id(facts.shared), facts.ours, item.clip, item.bucket, item.cropped)
        verdict = self._shared_verdicts.get(key)
        if verdict is None:
            expected = self.recipe.expected(self.entry, item, item.stamp)
            verdict = self._shared_verdicts[key] = judge_shared_latent(facts.ours, facts.shared, expected)
        stamp = item.stamp
        if facts.ours and (facts.source_mtime_ns != stamp.mtime_ns or facts.source_size != stamp.size):
            changed = source_change(facts, item.source.location, stamp, self.index.content_hash)
            if changed is not None:
                verdict = Verdict("stale", (*verdict.reasons, changed))
        return LatentRow(item, verdict, size)

    def texts(self, items: list[Item]) -> list[TextRow]:
        """One row per source that has items, in their order, and one for the empty caption."""
        rows: list[TextRow] = []
        last = None
        for item in items:
            if item.source is not last:
                last = item.source
                rows.append(self._text(last, item.text_name))
        if rows:
            name = unconditional_cache_name(self.entry.kind)
            rows.append(TextRow(None, name, *self._text_verdict(name, text_hash(""))))
        return rows

    def _text(self, source: Source, name: str) -> TextRow:
        if not source.has_caption:
            return TextRow(source, name, Verdict("missing", ("the source has no caption",)), 0)
        try:
            digest = self.index.caption_hash(source, self.entry.caption_prefix or "")
        except UserError as error:
            return TextRow(source, name, Verdict("missing", (error.message,)), 0)
        return TextRow(source, name, *self._text_verdict(name, digest))

    def _text_verdict(self, name: str, digest: str) -> tuple[Verdict, int]:
        if name not in self.present:
            return MISSING, 0
        facts, size = self.index.cache_facts(name, "text")
        if isinstance(facts, Verdict):
            return facts, size
        key = (id(facts.shared), facts.ours, facts.caption_hash is None, facts.caption_hash == digest)
        verdict = self._shared_texts.get(key)
        if verdict is None:
            expected = self.text_expected._replace(caption_hash=digest)
            verdict = self._shared_texts[key] = judge_text(facts, expected)
        return verdict, size

    def find_predecessors(self, rows: list[LatentRow]) -> None:
        """Call a missing cache stale when the same clip is there in another size: names hold the size.

        The old file stays an orphan: the new one gets another name.
        """
        wanted = {row.item.latent_name for row in rows}
        missing = [number for number, row in enumerate(rows) if row.verdict is MISSING]
        if not missing:
            return
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
