"""Hostile configurations are answered with a sentence, fast and in little memory."""

from __future__ import annotations

import resource
import time
import tracemalloc
from pathlib import Path

import pytest

from backend.config.dataset import load_dataset_config
from backend.config.dataset_document import DatasetDocument
from backend.errors import Problems

TABLE = '[[datasets]]\nvideo_directory = "/a"\n'

HOSTILE: dict[str, tuple[str, bytes]] = {
    "deep arrays": ("toml", b"a = " + b"[" * 200_000 + b"]" * 200_000),
    "deep tables": ("toml", b"a = " + b"{b = " * 40_000 + b"1" + b"}" * 40_000),
    "deep header": ("toml", b"[" + b".".join([b"a"] * 100_000) + b"]\n"),
    "dotted keys that lengthen": ("toml", b"\n".join(b".".join([b"a"] * n) + b".b = 1" for n in range(1, 400))),
    "quoted dotted keys": ("toml", b".".join([b'"a"'] * 50_000) + b" = 1"),
    "twenty dots": ("toml", b".".join([b"a"] * 21) + b" = 1\n" + TABLE.encode()),
    "key that is its own table": ("toml", b"a.b = 1\na.b.c = 2\n[a]\nb = 1\n"),
    "table that is its own child": ("toml", b"[a.b]\n[a.b.a]\n[a]\n[a.b]\n"),
    "ten megabytes": ("toml", b"# comment\n" * 1_000_000),
    "ten megabytes on a line": ("json", b'"' + b"x" * 10_000_000 + b'"'),
    "duplicate key": ("toml", b"[[datasets]]\nvideo_directory = '/a'\nvideo_directory = '/b'\n"),
    "duplicate table": ("toml", b"[general]\n[general]\n"),
    "duplicate in JSON": ("json", b'{"datasets": [], "datasets": []}'),
    "deep JSON": ("json", b"[" * 400_000),
    "JSON that is a list": ("json", b"[1, 2]"),
    "NaN in JSON": ("json", b'{"datasets": [{"video_directory": "/a", "source_fps": NaN}]}'),
    "half a character": ("json", b'{"datasets": [{"video_directory": "\\ud800"}]}'),
    "surrogate key": ("json", b'{"\\ud800": 1}'),
    "NUL": ("toml", b'[general]\ncaption_prefix = "a\0b"\n'),
    "escaped NUL": ("toml", b'[[datasets]]\nvideo_directory = "a\\u0000b"\n'),
    "Latin-1": ("toml", b'[[datasets]]\nvideo_directory = "\xe9"\n'),
    "UTF-16": ("toml", ("\ufeff" + TABLE).encode("utf-16")),
    "two BOMs": ("toml", b"\xef\xbb\xbf\xef\xbb\xbf[general]\n"),
    "number of a million digits": ("toml", b"a = " + b"9" * 400_000),
    "hexadecimal number of a million digits": ("toml", b"[general]\nbatch_size = 0x" + b"f" * 400_000),
    "date": ("toml", b"[[datasets]]\nvideo_directory = 1979-05-27T07:32:00Z\n"),
    "open string": ("toml", b'a = """' + b'\\"' * 100_000),
    "open literal": ("toml", b"a = '''" + b"''" * 100_000),
    "quotes": ("toml", b"'\"" * 200_000),
    "many tables": ("toml", b"[[datasets]]\n" * 35_000),
    "many keys": ("toml", b"[[datasets]]\n" + b"\n".join(b"resolutoin%d = 1" % n for n in range(20_000))),
    "long key": ("toml", b"[general]\n" + b"r" * 400_000 + b" = 1\n"),
    "many dots": ("toml", b". " * 200_000),
    "empty": ("toml", b""),
    "only dots": ("toml", b"..."),
    "random bytes": ("toml", bytes(range(256)) * 100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_answered_within_a_second_and_200_megabytes(name: str, tmp_path: Path) -> None:
    kind, data = HOSTILE[name]
    path = tmp_path / f"set.{kind}"
    path.write_bytes(data)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (load_dataset_config, lambda file: DatasetDocument.open(file).config()):
        start = time.process_time()
        with pytest.raises(Problems) as caught:
            read(path)
        # Time of this process: a machine that does something else meanwhile is no fault of the reader.
        assert time.process_time() - start < 1
        assert caught.value.problems
        assert len(str(caught.value)) < 30_000
        str(caught.value).encode("utf-8")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert grown < 200e6


WORST_DOCUMENTS = {
    "dotted": "\n".join(f"a.b.k{n} = 1" for n in range(20)),
    "comments": "# c\n" * 5900,
    "lines": "\n" * 23_900,
    "long text": f'a = "{"x" * 23_900}"',
    "tables": "\n".join(f"[k{n}]\na = 1" for n in range(1600)),
    "keys": "\n".join(f"k{n} = 1" for n in range(2200)),
    "array": "a = [" + "1," * 11_900 + "]",
    "inline tables": "a = [" + "{a=1}," * 3900 + "]",
    "nested": "a = " + "[" * 12 + "]" * 12,
}


@pytest.mark.parametrize("name", WORST_DOCUMENTS)
def test_the_largest_documents_are_edited_within_seconds(name: str, tmp_path: Path) -> None:
    """The library that keeps comments is quadratic in the length and exponential in dots: hence the limits."""
    path = tmp_path / "set.toml"
    path.write_text(WORST_DOCUMENTS[name] + "\n", "utf-8")
    start = time.process_time()
    document = DatasetDocument.open(path)
    assert time.process_time() - start < 0.5
    start = time.process_time()
    document.add_dataset({"video_directory": "/a"})
    document.set(0, "video_directory", "/b")
    assert document.save() is not None
    assert time.process_time() - start < 4
    assert document.datasets == [{"video_directory": "/b"}]


def test_missing_files_folders_and_odd_paths_are_answered(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, "a\0b.toml", tmp_path / ("x" * 300)):
        for read in (load_dataset_config, DatasetDocument.open):
            with pytest.raises(Problems):
                read(path)


def test_memory_of_the_largest_file_that_is_read_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "set.toml"
    count = 4000
    path.write_text("".join(f'[[datasets]]\nvideo_directory = "/clips/{n}"\nresolution = 512\n' for n in range(count)))
    tracemalloc.start()
    try:
        assert len(load_dataset_config(path).datasets) == count
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
