"""Everything that the code imports is asked for, bounded, and licensed to be used."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from tests.house.source_tree import PRODUCT, ROOT, imports, python_files

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "pydantic_core": "pydantic-core"}
OWN = ("backend", "k5ui", "app", "tests")


def _requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    stated = [line.split("#")[0].strip() for line in lines]
    found = [re.match(r"([A-Za-z0-9_.-]+)(.*)", line) for line in stated if line and not line.startswith("-")]
    return {match[1].lower(): match[2] for match in found if match}


def _needs_of(distribution: str) -> set[str]:
    """What a distribution asks for without extras."""
    stated = metadata.requires(distribution) or []
    names = [re.match(r"[A-Za-z0-9_.-]+", line) for line in stated if "extra ==" not in line]
    return {match[0].lower().replace("_", "-") for match in names if match}


def _third_party(*folders: str) -> set[str]:
    roots = {target.split(".")[0] for path in python_files(*folders) for _, target in imports(path)}
    return {DISTRIBUTIONS.get(name, name) for name in roots if name not in (*sys.stdlib_module_names, *OWN, "")}


def test_every_import_is_asked_for() -> None:
    """Directly, or by a library that is asked for and that states it as its own need (gradio brings fastapi)."""
    asked = set(_requirements("requirements.txt"))
    brought = asked.union(*(_needs_of(name) for name in asked))
    assert not _third_party(*PRODUCT) - brought
    tools = set(_requirements("requirements-dev.txt"))
    assert not _third_party("tests") - brought - tools


def test_every_requirement_is_bounded_on_both_sides() -> None:
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name, bounds in _requirements(file).items():
            assert ">=" in bounds, f"{file}: {name} has no lower bound"
            assert "<" in bounds, f"{file}: {name} has no upper bound"
