"""What the README and the docs tell people to type is real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from backend.config.docs import TOOLS
from backend.config.options import parse_command_line
from tests.house.source_tree import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _commands(text: str) -> Iterator[list[str]]:
    """The lines of all fenced blocks as words; lines that end in a backslash are joined."""
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith(("make", "python", ".venv/bin/python")):
                yield shlex.split(line, comments=True)


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_the_readme_shows_how_to_start_and_how_to_test() -> None:
    commands = list(_commands((ROOT / "README.md").read_text("utf-8")))
    assert ["make", "run"] in commands
    assert ["make", "test"] in commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_command_names_a_target(page) -> None:
    used = {words[1] for words in _commands(page.read_text("utf-8")) if words[0] == "make" and len(words) > 1}
    assert used <= _make_targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page) -> None:
    for words in _commands(page.read_text("utf-8")):
        if words[1:2] != ["-m"]:
            continue
        module = words[2]
        tool = module.removeprefix("backend.")
        if tool in TOOLS:
            parse_command_line(TOOLS[tool][1], words[3:], tool, "")
        else:
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: there is no {module}"


def test_pages_link_to_files_that_exist() -> None:
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert not missing
