"""No file grows past 500 lines and no function past 60: the tail is what makes code hard to read."""

from __future__ import annotations

import ast

from tests.house.source_tree import PRODUCT, parse, python_files, relative

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# "path" or "path::function" -> why it may be longer. Keep this short.
EXCEPTIONS: dict[str, str] = {}


def _files():
    return python_files(*PRODUCT, "tests")


def test_file_lengths() -> None:
    long = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _files()}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES and name not in EXCEPTIONS}
    assert not long


def _functions() -> dict[str, int]:
    return {
        f"{relative(path)}::{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in _files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_function_lengths() -> None:
    long = {name: lines for name, lines in _functions().items() if lines > MAX_FUNCTION_LINES}
    assert not {name: lines for name, lines in long.items() if name not in EXCEPTIONS}


def test_every_exception_is_still_needed() -> None:
    known = {relative(path) for path in _files()} | set(_functions())
    assert set(EXCEPTIONS) <= known
