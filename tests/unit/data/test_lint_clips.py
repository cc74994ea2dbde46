"""Each fault is found in a clip that has it, and in no clip that merely resembles one."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.data.lint.facts import FactStore
from backend.data.lint.finding import Finding
from backend.data.lint.media import Checked, duplicate_findings, rate_findings, source_findings
from backend.data.lint.survey import survey
from backend.data.scan import scan_dataset
from backend.data.watchdog import MediaReader
from tests.unit.data.dataset_folder import make_entry
from tests.unit.data.lint_clips import CASES, SIZE


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[Checked]:
    """All cases in one dataset whose clips have 49 frames, as the command measures them."""
    folder = tmp_path_factory.mktemp("clips")
    entry = make_entry(folder, "video", target_frames=[49], resolution=list(SIZE))
    for name, case in CASES.items():
        case.write(Path(entry.source) / f"{name}.mp4")
    with MediaReader(2) as reader:
        found = dict(survey(entry, scan_dataset(entry).sources, FactStore(entry), reader, 2))
    broken = {source.identity: str(fact) for source, fact in found.items() if isinstance(fact, Exception)}
    assert not broken
    return [Checked(entry, source, fact) for source, fact in found.items() if not isinstance(fact, Exception)]


@pytest.fixture(scope="module")
def findings(checked: list[Checked]) -> list[Finding]:
    alone = [finding for one in checked for finding in source_findings(one)]
    return [*alone, *rate_findings(checked[0].entry, checked), *duplicate_findings(checked)]


@pytest.mark.parametrize("name", CASES)
def test_a_clip_gives_exactly_the_findings_of_its_faults(name: str, findings: list[Finding]) -> None:
    found = {finding.kind for finding in findings if f"{name}.mp4" in finding.identities}
    assert found == CASES[name].expected


def _of(findings: list[Finding], name: str, kind: str) -> Finding:
    [found] = [one for one in findings if one.identities == (f"{name}.mp4",) and one.kind == kind]
    return found


def test_findings_say_where_and_how_much(findings: list[Finding]) -> None:
    [at] = _of(findings, "cut", "hard_cut").values["seconds"]
    assert at == pytest.approx(20 / 24, abs=0.002)
    [(start, end)] = _of(findings, "frozen half", "frozen").values["seconds"]
    assert start == pytest.approx(24 / 24, abs=0.05)
    assert end == pytest.approx(49 / 24, abs=0.002)
    opening = _of(findings, "black opening", "black")
    assert opening.values["seconds"] == [[0, pytest.approx(10 / 24, abs=0.002)]]
    assert opening.values["frames"] == 10
    assert (opening.severity, _of(findings, "black", "black").severity) == ("warning", "error")
    left, top, right, bottom = _of(findings, "letterbox", "letterbox").values["box"]
    assert (left, right) == (0, SIZE[0])
    assert top == pytest.approx(12, abs=2)
    assert bottom == pytest.approx(SIZE[1] - 12, abs=2)
    assert _of(findings, "30 a second", "odd_fps").values == {"fps": 30, "speed": 0.8, "sources": 1}
    assert _of(findings, "too short", "too_short").values["needed_frames"] == 49


def test_every_finding_offers_something_to_do(findings: list[Finding]) -> None:
    known = {"exclude", "set_source_fps_auto", "add_prefix", "edit_caption"}
    for finding in findings:
        assert finding.fixes
        assert set(finding.fixes) <= known
        assert finding.message.endswith(".")
        assert finding.identities
