"""The seal of a dataset whose caches were all valid: as long as every stamp is what it was, they still are.

The seal is a small file in the cache folder. Like the index it is a shortcut and nothing more: it holds one digest of
all that a check depends on, and counts. Whatever differs leads to an ordinary check.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

from backend.config.version import VERSION
from backend.data.cache_names import SEAL_FILE
from backend.data.recipes import LatentRecipe, TextRecipe
from backend.data.scan import Scan
from backend.data.stat_many import FIELD_COUNT, stat_many
from backend.errors import UserError
from backend.files import write_atomic

if TYPE_CHECKING:
    from backend.config.dataset import DatasetEntry

# A file that was written so shortly before a look may be written again without getting another time.
_SETTLED_NS = 2_000_000_000
Row = TypeVar("Row")
#: (frames, width, height) of clips as they are encoded.
Shape = tuple[int, int, int]


class Seal(NamedTuple):
    """What a check would depend on: digests of the names and settings, and of the stamps of all files.

    `settled` is False while one of the files is so young that its stamp proves nothing.
    """

    names: str
    stamps: str
    settled: bool


class Sealed(NamedTuple):
    """What a seal says of a dataset: numbers of caches, their bytes, and how many clips have which shape."""

    latents: int
    latent_bytes: int
    texts: int
    text_bytes: int
    shapes: dict[Shape, int]


class ValidRows(Sequence[Row]):
    """Rows of caches that are all valid: counted already, made only for whoever looks at them."""

    def __init__(self, count: int, size: int, make: Callable[[], Sequence[Row]]) -> None:
        """`size`: bytes of all these caches; `make` does what an ordinary check does."""
        self._count, self.bytes, self._make = count, size, make
        self._rows: Sequence[Row] | None = None

    @property
    def rows(self) -> Sequence[Row]:
        """The rows themselves."""
        if self._rows is None:
            self._rows = self._make()
        return self._rows

    def __len__(self) -> int:
        return self._count if self._rows is None else len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        return self.rows[place]

    def __eq__(self, other: object) -> bool:
        return list(self.rows) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


def may_be_whole(scan: Scan, count: int) -> bool:
    """Whether a dataset can be wholly cached at all, by the number of files: only then a seal is worth it."""
    return bool(scan.sources) and not scan.problems and not scan.missing_captions and count > 2 * len(scan.sources)


def names_digest(
    entry: DatasetEntry, recipe: LatentRecipe, text: TextRecipe, scan: Scan, present: Sequence[str]
) -> str:
    """A digest of the settings, of all sources with captions that stand in the dataset, and of all cache files.

    `present`: names of the cache files, sorted.
    """
    # Another version of the program may judge differently.
    settings = repr((VERSION, entry, recipe, text, text.shared(entry.kind), len(scan.excluded)))
    digest = hashlib.sha256(settings.encode("utf-8", "backslashreplace"))
    sources, captions = scan.sources, [source.caption or "" for source in scan.sources]
    # Of these texts captions alone can hold the letter between them; JSON separates whatever is in them.
    inline = json.dumps(captions) if any(captions) else ""
    files = [source.location for source in sources] + [source.caption_location or "" for source in sources]
    digest.update("\0".join((*files, *present, inline)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def take_seal(names: str, scan: Scan, folder: str, present: Sequence[str]) -> Seal | None:
    """Ask every source, caption and cache for its stamp; None if one cannot be asked or is a folder of frames."""
    base = os.path.join(folder, "")
    locations = chain(
        (source.location for source in scan.sources),
        (source.caption_location for source in scan.sources if source.caption_location is not None),
        (base + name for name in present),
    )
    now = time.time_ns()
    facts = stat_many(list(locations))
    if facts is None or any(map(stat.S_ISDIR, set(facts[3::FIELD_COUNT]))):
        return None
    return Seal(names, hashlib.sha256(facts).hexdigest(), max(facts[1::FIELD_COUNT]) < now - _SETTLED_NS)


def read_seal(folder: str) -> tuple[Seal, Sealed] | None:
    """The stored seal; None if there is none, or one of another version or damaged."""
    try:
        with open(os.path.join(folder, SEAL_FILE), encoding="ascii") as handle:
            stored: Any = json.load(handle)
        seal = Seal(stored["names"], stored["stamps"], settled=True)
        shapes = {(frames, width, height): count for frames, width, height, count in stored["shapes"]}
        sealed = Sealed(stored["latents"], stored["latent_bytes"], stored["texts"], stored["text_bytes"], shapes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(type(number) is int and number >= 0 for number in (*sealed[:-1], *shapes.values()))
    return (seal, sealed) if whole else None


def write_seal(folder: str, seal: Seal, sealed: Sealed) -> None:
    """Store a seal that was taken before the check that found everything valid."""
    document = {
        "names": seal.names,
        "stamps": seal.stamps,
        **sealed._replace(shapes={})._asdict(),
        "shapes": [[*shape, count] for shape, count in sealed.shapes.items()],
    }
    # A folder that may be read but not written is checked all the same, only more slowly.
    with suppress(UserError, OSError):
        write_atomic(os.path.join(folder, SEAL_FILE), json.dumps(document) + "\n")
