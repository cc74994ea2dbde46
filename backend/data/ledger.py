"""The ledger: the state of every cache of a dataset, what is missing, what is left over, and how large it all is."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

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
from backend.data.ledger_seal import (
    Seal,
    Sealed,
    Shape,
    ValidRows,
    may_be_whole,
    names_digest,
    read_seal,
    take_seal,
    write_seal,
)
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
Row = TypeVar("Row", bound=LatentRow | TextRow)


class Orphan(NamedTuple):
    """A cache file that belongs to no item; `why` is "no item" or "unfinished" (its writer was killed)."""

    name: str
    why: str
    stamp: Stamp


@dataclass
class DatasetLedger:
    """Everything about the caches of one dataset.

    `held` counts cache files of sources that could not be read: they may be needed again and are no orphans.
    `excluded` counts the sources that the configuration leaves out; their caches are orphans. `shapes` says how many
    items are encoded as how many frames of which width and height.
    """

    index: int
    kind: str
    cache_directory: str
    sources: int
    latents: Sequence[LatentRow] = field(default_factory=list)
    texts: Sequence[TextRow] = field(default_factory=list)
    shapes: Mapping[Shape, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    missing_captions: list[Source] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    held: int = 0
    excluded: int = 0

    @property
    def latent_states(self) -> dict[str, int]:
        """How many latent caches are in each state."""
        return count_states(self.latents)

    @property
    def text_states(self) -> dict[str, int]:
        """How many text caches are in each state."""
        return count_states(self.texts)

    @property
    def bytes(self) -> int:
        """Size of all caches that belong to items."""
        return bytes_of(self.latents) + bytes_of(self.texts)

    @property
    def orphan_bytes(self) -> int:
        """Size of all orphans."""
        return sum(orphan.stamp.size for orphan in self.orphans)

    @property
    def ready(self) -> bool:
        """Whether there is something to train on and all of it is usable."""
        rows = [*not_valid(self.latents), *not_valid(self.texts)]
        return bool(self.latents) and not self.problems and all(row.verdict.usable for row in rows)


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
    check = _Check(entry, latents or LatentRecipe(), text or TextRecipe(), reader, on_progress)
    with no_collection():
        scan = scan_dataset(entry)
        seal, sealed = check.compare_seal(scan)
    if sealed is not None:
        return check.sealed(scan, sealed)
    ledger = check.run(scan)
    # The seal was taken before the check: what changed in between gives it another stamp next time.
    if seal is not None and seal.settled and _is_whole(ledger):
        sizes = bytes_of(ledger.latents), bytes_of(ledger.texts)
        counts = len(ledger.latents), sizes[0], len(ledger.texts), sizes[1]
        write_seal(check.folder, seal, Sealed(*counts, dict(ledger.shapes)))
    return ledger


class _Check(NamedTuple):
    """What a check is asked for."""

    entry: DatasetEntry
    recipe: LatentRecipe
    text: TextRecipe
    reader: MediaReader | None
    on_progress: Progress | None

    @property
    def folder(self) -> str:
        return os.path.abspath(os.fspath(self.entry.cache_directory))

    def compare_seal(self, scan: Scan) -> tuple[Seal | None, Sealed | None]:
        """The seal that the dataset has now, if it can have one, and what the stored one says if it is the same."""
        files = _list_names(self.folder)
        if not may_be_whole(scan, len(files)):
            return None, None
        names = names_digest(self.entry, self.recipe, self.text, scan, files)
        seal, stored = take_seal(names, scan, self.folder, files), read_seal(self.folder)
        same = seal is not None and stored is not None and seal[:2] == stored[0][:2]
        return seal, stored[1] if same and stored is not None else None

    def run(self, scan: Scan) -> DatasetLedger:
        """Look at every source and judge every cache."""
        present = _list_caches(self.folder)
        # One pause for all that is quick: after each, the collector looks through everything once.
        with no_collection():
            index = LedgerIndex(self.folder)
            if self.reader is None and self.on_progress is None and index.count_new(scan.sources) <= FEW:
                return _judged(self, scan, present, index, look_here(scan.sources, index))
        looks = look_at_all(scan.sources, index=index, reader=self.reader, on_progress=self.on_progress)
        with no_collection():
            return _judged(self, scan, present, index, looks)

    def sealed(self, scan: Scan, sealed: Sealed) -> DatasetLedger:
        """The ledger of a dataset of which nothing has changed since all of it was valid."""
        quietly = self._replace(reader=None, on_progress=None)
        full = functools.cache(lambda: quietly.run(scan))
        ledger = _empty_ledger(self, scan)
        ledger.latents = ValidRows(sealed.latents, sealed.latent_bytes, lambda: full().latents)
        ledger.texts = ValidRows(sealed.texts, sealed.text_bytes, lambda: full().texts)
        ledger.shapes = sealed.shapes
        return ledger


def _is_whole(ledger: DatasetLedger) -> bool:
    """Whether all is valid and there is nothing else to tell."""
    told = ledger.skipped or ledger.missing_captions or ledger.problems or ledger.orphans or ledger.held
    return bool(ledger.latents) and not told and not not_valid(ledger.latents) and not not_valid(ledger.texts)


def _empty_ledger(check: _Check, scan: Scan) -> DatasetLedger:
    return DatasetLedger(
        check.entry.index,
        check.entry.kind,
        check.folder,
        len(scan.sources),
        missing_captions=scan.missing_captions,
        problems=scan.problems,
        excluded=len(scan.excluded),
    )


def _judged(check: _Check, scan: Scan, present: set[str], index: LedgerIndex, looks: Looks) -> DatasetLedger:
    entry, folder, recipe, text = check.entry, check.folder, check.recipe, check.text
    plan = build_items(entry, scan.sources, nabla=recipe.nabla, look=looks.look)
    ledger = _empty_ledger(check, scan)
    ledger.skipped = plan.skipped
    ledger.shapes = Counter((item.frames, item.bucket.width, item.bucket.height) for item in plan.items)
    judge = _Judge(entry, folder, present, index, recipe, text)
    ledger.latents = judge.latents(plan.items)
    ledger.texts = judge.texts(plan.items)
    judge.find_predecessors(ledger.latents)
    _find_orphans(ledger, present)
    index.save()
    return ledger


def _list_names(folder: str) -> list[str]:
    """Sorted names of what looks like a cache; none if the folder cannot be read, which the check itself then says."""
    try:
        return sorted([name for name in os.listdir(folder) if name.endswith(".safetensors")])
    except OSError:
        return []


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


def not_valid(rows: Sequence[Row]) -> list[Row]:
    """Those rows that are not valid, without making rows that are known to be."""
    return [] if isinstance(rows, ValidRows) else [row for row in rows if row.verdict.state != "valid"]


def bytes_of(rows: Sequence[LatentRow | TextRow]) -> int:
    """Size of the caches of these rows."""
    return rows.bytes if isinstance(rows, ValidRows) else sum(row.bytes for row in rows)


def count_states(rows: Sequence[LatentRow | TextRow]) -> dict[str, int]:
    """How many of these rows are in each state."""
    if isinstance(rows, ValidRows):
        return {state: len(rows) if state == "valid" else 0 for state in STATES}
    found = Counter(row.verdict.state for row in rows)
    return {state: found.get(state, 0) for state in STATES}
