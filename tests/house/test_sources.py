"""Things that the product's sources never hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.house.source_tree import (
    PRODUCT,
    ROOT,
    docstring_ids,
    import_time_nodes,
    imports,
    parse,
    python_files,
    relative,
)

DEVICE_MODULE = "backend/model/device.py"
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")


def _finding(path: Path, node: ast.AST) -> str:
    return f"{relative(path)}:{getattr(node, 'lineno', 0)} {ast.unparse(node)[:80]}"


def _dotted(node: ast.AST) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _device_literals(path: Path) -> Iterator[str]:
    if relative(path) == DEVICE_MODULE:
        return
    tree = parse(path)
    docstrings = docstring_ids(tree)
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if id(node) not in docstrings and re.fullmatch(r"cuda(:\d*)?", text.strip()):
            yield _finding(path, node)
        if isinstance(node, ast.Attribute) and (_dotted(node) == "torch.cuda" or node.attr in ("cuda", "is_cuda")):
            yield _finding(path, node)


def _shells(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            shell = any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            if shell or _dotted(node.func) in ("os.system", "os.popen", "subprocess.getoutput"):
                yield _finding(path, node)


def _code_from_data(path: Path) -> Iterator[str]:
    """eval, exec, pickle in all its forms, and remote code: each runs what somebody else wrote."""
    for line, name in imports(path):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
            yield f"{relative(path)}:{line} imports {name}"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            remote = any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in node.keywords)
            if name in ("eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load") or remote:
                yield _finding(path, node)


_WRITES = ("print", "logging.basicConfig", "os.putenv", "os.chdir", "warnings.filterwarnings", "warnings.simplefilter")
_ENVIRONMENT_METHODS = ("setdefault", "update", "pop", "clear")


def _work_at_import(path: Path) -> Iterator[str]:
    for node in import_time_nodes(parse(path)):
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            if name in _WRITES or name in tuple(f"os.environ.{method}" for method in _ENVIRONMENT_METHODS):
                yield _finding(path, node)
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        if any(isinstance(t, ast.Subscript) and _dotted(t.value) == "os.environ" for t in targets):
            yield _finding(path, node)


def _unfinished(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if UNFINISHED.search(line):
            yield f"{relative(path)}:{number} {line.strip()[:80]}"


@pytest.mark.parametrize("check", [_device_literals, _shells, _code_from_data, _work_at_import, _unfinished])
def test_the_sources_hold_none_of(check: Callable[[Path], Iterator[str]]) -> None:
    found = [finding for path in python_files(*PRODUCT) for finding in check(path)]
    assert not found, "\n".join(found)


PLANTED = {
    _device_literals: ['x = "cuda"', 'f"cuda:{1}"', "torch.cuda.synchronize()", "x.cuda()"],
    _shells: ["subprocess.run('ls', shell=True)", "os.system('ls')"],
    _code_from_data: ["eval('1')", "import pickle", "torch.load('x')", "f(trust_remote_code=True)"],
    _work_at_import: ["print('hi')", "os.environ['A'] = 'b'", "os.environ.setdefault('A', 'b')"],
    _unfinished: ["x = 1  # TODO", "raise NotImplementedError"],
}


@pytest.mark.parametrize(("check", "line"), [(check, line) for check, lines in PLANTED.items() for line in lines])
def test_the_checks_themselves_find_what_is_planted(check, line: str, monkeypatch, tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr("tests.house.source_tree.ROOT", tmp_path)
    assert list(check(planted))


def test_ruff_finds_nothing() -> None:
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
