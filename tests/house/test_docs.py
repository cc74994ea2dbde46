"""The option tables in the docs are made from the definitions, are complete and are current."""

from __future__ import annotations

import pytest

from backend.config import docs
from backend.config.options import build_parser, specs


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check"]) == 0, capsys.readouterr().err


def test_check_notices_an_old_page(monkeypatch, tmp_path, capsys) -> None:
    old = tmp_path / "options.md"
    monkeypatch.setattr(docs, "OPTIONS_PAGE", old)
    monkeypatch.setattr(docs, "DATASET_PAGE", tmp_path / "dataset.md")
    assert docs.main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    for page in tmp_path.iterdir():
        text = page.read_text("utf-8")
        page.write_text(text.replace("e", "a", 1), encoding="utf-8")
        assert docs.main(["--check"]) == 1
        page.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("module", list(docs.TOOLS))
def test_every_flag_is_on_the_page(module: str) -> None:
    title, model = docs.TOOLS[module]
    page = docs.OPTIONS_PAGE.read_text("utf-8")
    section = page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    flags = {flag for action in build_parser(model, module, "")._actions for flag in action.option_strings}
    hidden = {f"--no_{spec.name}" for spec in specs(model)} | {"-h", "--help"}
    missing = {flag for flag in flags - hidden if f"`{flag}`" not in section}
    assert not missing


@pytest.mark.parametrize("module", list(docs.TOOLS))
def test_every_option_has_one_sentence_of_help(module: str) -> None:
    for spec in specs(docs.TOOLS[module][1]):
        assert spec.help[0].isupper(), spec.name
        assert spec.help.endswith("."), spec.name
        assert len(spec.help) <= 200, spec.name


def test_the_tables_are_well_formed() -> None:
    """A stray pipe in a help text would shift every cell after it."""
    width = 0
    for line in (*docs.options_page().splitlines(), *docs.dataset_page().splitlines()):
        cells = line.replace("\\|", "").count("|")
        if not line.startswith("|"):
            width = 0
        elif width:
            assert cells == width, line
        else:
            width = cells
