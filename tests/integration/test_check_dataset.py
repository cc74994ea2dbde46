"""`python -m backend.kandinsky5_check_dataset` on real clips, on faulty ones, and on mistakes of the request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest

from backend.caching import findings as command
from backend.config.tasks import TASKS, default_weights
from backend.data.lint.facts import FACTS_FILE
from backend.events import read_events
from backend.kandinsky5_check_dataset import main
from tests.conftest import REPOSITORY
from tests.real_clips import caption, real_clip, real_dataset, real_still, sample_clips
from tests.unit.data.clips import write_clip

ENCODER = str(default_weights(TASKS["k5-demo-t2v"]).text_encoder_qwen)


class Checked(NamedTuple):
    """What the command said."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Journal records of one type."""
        return [dict(one) for one in read_events(self.folder / "events.jsonl").records if one["type"] == kind]

    @property
    def report(self) -> dict[str, Any]:
        """The report in the run folder."""
        return json.loads((self.folder / "findings.json").read_text("utf-8"))

    def kinds(self) -> set[tuple[str, tuple[str, ...]]]:
        """Kind and sources of every finding."""
        return {(one["kind"], tuple(one["identities"])) for one in self.report["findings"]}


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command in this process, each time with a run folder of its own."""
    numbers = iter(range(100))

    def run(config: Path, *words: str) -> Checked:
        folder = tmp_path / "runs" / str(next(numbers))
        capsys.readouterr()
        code = main(["--dataset_config", str(config), *words, "--run_dir", str(folder)])
        said = capsys.readouterr()
        return Checked(code, said.out, said.err, folder)

    return run


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six real clips of one shot each, and two real stills."""
    return real_dataset(tmp_path_factory.mktemp("real"))


def test_real_clips_give_no_false_alarm(check, real: Path) -> None:
    done = check(real, "--text_encoder_qwen", ENCODER)
    assert done.code == 0, done.stderr
    assert done.report["version"] == 1
    assert done.report["datasets"] == [
        {"index": 0, "sources": 6, "checked": 6},
        {"index": 1, "sources": 2, "checked": 2},
    ]
    # The two rabbits are the same frames at two sizes and rates, one of them squeezed.
    assert done.kinds() == {("too_short", ("phone_short.mp4",)), ("near_duplicate", ("bunny.mp4", "bunny_tall.mkv"))}
    assert "Too short for any clip (error, 1)" in done.stdout
    assert done.events("finished")[-1]["outputs"] == ["findings.json"]
    assert done.events("progress")[-1]["done"] == 8
    assert not done.events("warning")


def test_cuts_of_a_real_video_are_found(check, tmp_path: Path) -> None:
    """bikes.mp4 has five hard cuts, between fast cars and people; the animation and the face have none."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, path in sample_clips().items():
        caption(clips / f"{name}.mp4", f"a clip of {name}")
        (clips / f"{name}.mp4").write_bytes(path.read_bytes())
    config = tmp_path / "d.toml"
    keys = f"video_directory = '{clips}'\ncache_directory = '{tmp_path}/cache'\nframe_extraction = 'full'\n"
    config.write_text(f"[[datasets]]\n{keys}max_frames = 300\nresolution = [160, 96]\nenable_bucket = true\n")
    done = check(config)
    assert done.code == 0, done.stderr
    wrong = {"black", "frozen", "hard_cut", "letterbox", "near_duplicate", "variable_rate"}
    found = [one for one in done.report["findings"] if one["kind"] in wrong]
    assert [one["identities"] for one in found] == [["bikes.mp4"]]
    assert found[0]["values"]["seconds"] == pytest.approx([1.2, 3.04, 5.48, 7.48, 9.68], abs=0.01)


def _faulty(folder: Path) -> Path:
    """A dataset with one fault of most kinds, over two tables."""
    clips, more = folder / "clips", folder / "more"
    caption(real_clip(clips / "good.mp4", "bunny", (160, 96), 20), "a zorb rabbit")
    caption(real_clip(clips / "rate.mp4", "bikes", (160, 96), 20, rate=30), "a zorb street")
    caption(real_clip(clips / "small.mp4", "phone", (48, 32), 20), "a zorb face, " + "very long " * 300)
    caption(write_clip(clips / "black.mp4", 20, (160, 96), draw=lambda _: numpy.zeros((96, 160, 3), "u1")), "zorb")
    real_clip(clips / "silent.mp4", "bikes", (160, 96), 20, start=140)
    caption(clips / "broken.mp4", "a zorb street")
    (clips / "broken.mp4").write_bytes(b"no video")
    caption(real_clip(more / "copy.mp4", "bunny", (128, 78), 20), "a zorb street")
    caption(real_still(more / "street.png", "bikes", (200, 120)), "a street")
    config = folder / "d.toml"
    config.write_text(
        f"""
[general]
resolution = [160, 96]
enable_bucket = true

[[datasets]]
video_directory = '{clips}'
cache_directory = '{folder / "cache"}'
target_frames = [17]

[[datasets]]
image_directory = '{more}'
cache_directory = '{folder / "cache_more"}'

[[datasets]]
video_directory = '{more}'
cache_directory = '{folder / "cache_third"}'
target_frames = [17]
caption_extension = ".caption"

[[datasets]]
video_directory = '{folder / "nowhere"}'
enabled = false
""",
        encoding="utf-8",
    )
    (more / "copy.caption").write_text("a zorb rabbit too", encoding="utf-8")
    return config


EXPECTED = {
    ("broken", ("broken.mp4",)),
    ("no_caption", ("silent.mp4",)),
    ("black", ("black.mp4",)),
    ("odd_fps", ("rate.mp4",)),
    ("too_small", ("small.mp4",)),
    ("token_limit", ("small.mp4",)),
    ("equal_captions", ("broken.mp4", "rate.mp4")),
    ("missing_trigger", ("street.png",)),
    ("near_duplicate", ("good.mp4", "copy.mp4")),
}


def test_every_fault_is_reported_once_and_the_second_run_measures_nothing(
    check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _faulty(tmp_path)
    words = ("--text_encoder_qwen", ENCODER, "--trigger_word", "zorb", "--num_workers", "2")
    first = check(config, *words)
    assert first.code == 0, first.stderr
    assert first.kinds() == EXPECTED
    [copies] = [one for one in first.report["findings"] if one["kind"] == "near_duplicate"]
    assert (copies["dataset"], copies["values"]["datasets"]) == (0, [0, 2])
    severities = [one["severity"] for one in first.report["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)

    opened: list[str] = []

    class Counting(command.MediaReader):
        def probe(self, path):
            opened.append(Path(path).name)
            return super().probe(path)

    monkeypatch.setattr(command, "MediaReader", Counting)
    second = check(config, *words, "--report_format", "json", "--output", str(tmp_path / "out" / "report.json"))
    assert opened == ["broken.mp4"]  # what failed is tried again
    assert second.report == first.report
    assert json.loads(second.stdout) == first.report
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) == first.report
    assert second.events("finished")[-1]["outputs"] == [str(tmp_path / "out" / "report.json"), "findings.json"]
    assert (tmp_path / "cache" / FACTS_FILE).is_file()


def test_without_a_tokenizer_that_is_said_once(check, real: Path) -> None:
    done = check(real)
    assert done.code == 0
    assert [one["field"] for one in done.events("warning")] == ["text_encoder_qwen"]
    assert done.stderr.count("not counted") == 1


def test_a_stop_request_ends_the_check_and_keeps_what_was_measured(check, tmp_path: Path) -> None:
    config = real_dataset(tmp_path)
    folder = tmp_path / "runs" / "0"
    (folder / "requests").mkdir(parents=True)
    (folder / "requests" / "stop").touch()
    done = check(config, "--num_workers", "1")
    assert done.code == 0
    assert [record["type"] for record in done.events("stopped")] == ["stopped"]
    assert not (folder / "findings.json").exists()
    assert (tmp_path / "cache_clips" / FACTS_FILE).is_file()
    assert check(config).code == 0


def test_mistakes_of_the_request_are_all_reported(check, real: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = check(real, "--text_encoder_qwen", str(tmp_path), "--output", str(tmp_path / "file" / "report.json"))
    assert done.code == 2
    assert {one["field"] for one in done.events("error")[-1]["problems"]} == {"text_encoder_qwen", "output"}
    missing = check(tmp_path / "missing.toml", "--nabla_stretch")
    assert missing.code == 2
    fields = {one["field"] for one in missing.events("error")[-1]["problems"]}
    assert fields == {"dataset_config", "nabla_stretch"}
    assert main([]) == 2


_PROBE = """
import sys
from backend.kandinsky5_check_dataset import main
code = main(sys.argv[1:])
print("loaded:", sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def test_the_command_needs_no_torch(real: Path) -> None:
    """Trap: a check that loads torch takes half a minute before it says that a folder is missing."""
    words = ["--dataset_config", str(real), "--text_encoder_qwen", ENCODER, "--report_format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {one["kind"] for one in json.loads(done.stdout)["findings"]} == {"too_short", "near_duplicate"}
    assert "loaded: []" in done.stderr
