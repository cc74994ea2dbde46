"""The generate command with the demo model: files, journal, stops, repetition and memory options."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import tomlkit
import torch
from PIL import Image

from backend import kandinsky5_generate_video
from backend.config.metadata import read_settings
from backend.config.tasks import DEMO_WEIGHTS
from backend.events import read_events
from backend.files import fingerprint
from backend.progress import StepMeter
from backend.sampling import clip_vae as vae_module
from backend.sampling import clips as clips_module
from backend.sampling import transformer as transformer_module
from backend.sampling.condition import normalise_first_frames
from backend.sampling.outputs import read_latent
from tests.integration.command import TINY, Run, run_command

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
PROMPT = "a red circle moves left on a black background"
LATENT = (*TINY, "--output_type", "latent")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs of this module: they share the cache of text embeddings."""
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def both(work: Path) -> Run:
    """One clip and its latents."""
    return run_command(
        work / "both", "--task", "k5-demo-t2v", "--steps", "2", "--prompt", PROMPT, "--output_type", "both"
    )


def _latents(run: Run) -> list[torch.Tensor]:
    assert run.code == 0, run.stderr
    return [read_latent(path)[0] for path in run.files() if path.name.endswith(".latent.safetensors")]


def _one(work: Path, name: str, *words: str) -> torch.Tensor:
    (latents,) = _latents(run_command(work / name, *LATENT, "--prompt", PROMPT, *words))
    return latents


@pytest.fixture(scope="module")
def base(work: Path) -> torch.Tensor:
    """Latents of the tiny clip that other runs are compared with."""
    return _one(work, "base")


def _frames(path: Path) -> numpy.ndarray:
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- one clip -----------------------------------------------------------------------------------------------------


def test_a_clip_and_its_latents(both: Run) -> None:
    assert both.code == 0
    clip, latent = both.files()
    assert clip.parent == latent.parent == both.folder / "outputs"
    assert latent.name == f"{clip.stem}.latent.safetensors"
    assert _frames(clip).shape == (17, 64, 64, 3)
    assert read_latent(latent)[0].shape == (16, 5, 8, 8)
    assert sorted(item.name for item in clip.parent.iterdir()) == sorted([clip.name, latent.name])


def test_the_journal_tells_the_run_in_order(both: Run) -> None:
    types = [record["type"] for record in both.events if record["type"] not in ("heartbeat", "progress")]
    assert types == [
        "started", "phase", "phase", "phase", "step", "step", "phase", "phase", "phase", "sample", "sample", "finished",
    ]  # fmt: skip
    assert [record["phase"] for record in both.of("phase")] == ["text", "load", "denoise", "decode", "vae", "save"]
    assert [record["seq"] for record in both.events] == list(range(1, len(both.events) + 1))
    started, finished = both.of("started")[0], both.of("finished")[0]
    assert (started["entry"], started["task"]) == ("kandinsky5_generate_video", "k5-demo-t2v")
    assert set(started["versions"]) == {"python", "k5", "torch", "diffusers", "transformers", "av"}
    assert finished["outputs"] == [record["path"] for record in both.of("sample")]
    assert finished["seconds"] > 0
    steps = [(record["step"], record["total"], record["item"], record["items"]) for record in both.of("step")]
    assert steps == [(1, 2, 1, 1), (2, 2, 1, 1)]
    assert both.of("step")[0]["remaining_seconds"] > both.of("step")[1]["remaining_seconds"] == 0
    sample = both.of("sample")[0]
    shown = {key: sample[key] for key in ("kind", "width", "height", "frames", "fps", "seed", "prompt", "item")}
    assert shown == {
        "kind": "video", "width": 64, "height": 64, "frames": 17, "fps": 24, "seed": 42, "prompt": PROMPT, "item": 1,
    }  # fmt: skip
    assert both.of("sample")[1]["kind"] == "latent"
    assert "Traceback" not in both.stderr


def test_every_file_carries_what_made_it(both: Run) -> None:
    clip, latent = both.files()
    settings = read_settings(clip)
    assert settings == read_settings(latent)
    assert settings["weights"]["dit"]["fingerprint"] == fingerprint(DEMO_WEIGHTS / "transformer")
    assert settings["options"]["prompt"] == PROMPT
    assert (settings["seed"], settings["frames"], settings["fps"], settings["loras"]) == (42, 17, 24, [])
    assert settings["computed"] == {"device": "cpu", "dtype": "float32", "attention": "sdpa"}


def test_settings_of_a_clip_make_it_again(both: Run, work: Path) -> None:
    """Drop a clip, use its settings: the latents are equal bit for bit."""
    options = read_settings(both.files()[0])["options"] | {"output_type": "latent"}
    (work / "again.toml").write_text(tomlkit.dumps(options), "utf-8")
    (found,) = _latents(run_command(work / "again", "--config_file", str(work / "again.toml")))
    assert torch.equal(found, read_latent(both.files()[1])[0])


def test_latents_decode_later_to_the_same_frames(both: Run, work: Path) -> None:
    clip, latent = both.files()
    words = ("--task", "k5-demo-t2v", "--latent_path", str(latent))
    later = run_command(work / "later", *words, "--output", str(work / "later.mp4"))
    assert later.code == 0, later.stderr
    assert numpy.array_equal(_frames(work / "later.mp4"), _frames(clip))
    assert read_settings(work / "later.mp4")["seed"] == 42
    output = ("--output_type", "images", "--output", str(work / "stills" / "a.png"))
    stills = run_command(work / "stills", *words, *output, "--fps", "12")
    sample, settings = stills.of("sample")[0], read_settings(stills.files()[0])
    assert (sample["frames"], sample["fps"], sample["seconds"], sample["prompt"]) == (17, 12, 1.4167, PROMPT)
    assert (settings["fps"], settings["options"]["fps"]) == (12, 12)
    assert [path.name for path in stills.files()] == [f"a_{number:05d}.png" for number in range(1, 18)]
    with Image.open(stills.files()[0]) as image:
        difference = numpy.abs(numpy.asarray(image).astype(int) - _frames(clip)[0])
    assert numpy.median(difference) < 12


def test_one_frame_is_an_image(work: Path) -> None:
    run = run_command(work / "still", "--task", "k5-demo-t2v", "--steps", "1", "--prompt", PROMPT, "--frames", "1")
    (path,) = run.files()
    assert path.suffix == ".png"
    assert run.of("sample")[0]["kind"] == "image"
    with Image.open(path) as image:
        assert image.size == (64, 64)
    assert read_settings(path)["frames"] == 1


# --- seeds --------------------------------------------------------------------------------------------------------


def test_a_seed_decides(base: torch.Tensor, work: Path) -> None:
    assert torch.equal(_one(work, "same"), base)
    other = _one(work, "other", "--seed", "43")
    assert _relative(other, base) > 0.1
    drawn = run_command(work / "drawn", *LATENT, "--prompt", PROMPT, "--seed", "-1")
    seed = drawn.of("sample")[0]["seed"]
    assert 0 <= seed < 2**32
    assert read_settings(drawn.files()[0])["options"]["seed"] == seed
    assert torch.equal(_one(work, "drawn again", "--seed", str(seed)), _latents(drawn)[0])


def test_lengths_that_do_not_fit_are_rounded_with_a_warning(base: torch.Tensor, work: Path) -> None:
    run = run_command(work / "round", *LATENT, "--prompt", PROMPT, "--frames", "7")
    assert [record["field"] for record in run.of("warning")] == ["frames"]
    assert torch.equal(_latents(run)[0], base)


# --- prompt files -------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts how often each part of the model is loaded."""
    from backend.text import encoders

    counts = {"qwen": 0, "clip": 0, "dit": 0, "vae": 0}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **named)

        return wrapper

    for name, owner, attribute in (
        ("qwen", encoders.QwenEncoder, "__init__"), ("clip", encoders.ClipEncoder, "__init__"),
        ("dit", transformer_module, "load_transformer"), ("vae", vae_module, "load_vae"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    return counts


def test_a_prompt_file_loads_each_part_once(
    base: torch.Tensor, work: Path, loads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap B21: a peer loads the encoders and the VAE again for every prompt. Writing early changes no bit."""
    file = work / "prompts.txt"
    file.write_text(f"{PROMPT}\n# no clip\na blue square --d 7 --n blurry\n{PROMPT} --s 3\n", "utf-8")
    words = (*TINY, "--from_file", str(file), "--output_type", "both")
    run = run_command(work / "many", *words)
    assert loads == {"qwen": 1, "clip": 1, "dit": 1, "vae": 1}
    found = _latents(run)
    assert len(found) == 3
    assert torch.equal(found[0], base)
    assert [(record["item"], record["step"]) for record in run.of("step")] == [
        (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip
    assert len({path.name for path in run.files()}) == 6
    assert read_settings(run.files()[2])["options"]["negative_prompt"] == "blurry"
    early = run_command(work / "early", *words, "--offload_dit_during_sampling")
    assert loads == {"qwen": 1, "clip": 1, "dit": 2, "vae": 2}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_latents(early), found, strict=True))
    for ours, theirs in zip(early.files(), run.files(), strict=True):
        if ours.suffix == ".mp4":
            assert numpy.array_equal(_frames(ours), _frames(theirs))
    order = [record["type"] for record in early.events if record["type"] in ("step", "sample")]
    assert order == [*["step"] * 2, *["sample"] * 2] * 2 + ["step"] * 3 + ["sample"] * 2


_LOADED = """
import sys
from backend.kandinsky5_generate_video import main
code = main(sys.argv[1:])
print(code, sorted(name for name in sys.modules if name in ("torch", "transformers", "backend.text.encoders")))
"""


def test_a_repeated_prompt_loads_no_encoder(base: torch.Tensor, work: Path, repository: Path) -> None:
    """In a fresh process: with latents as output not even the library of the encoders is imported."""
    words = [*LATENT, "--prompt", PROMPT, "--text_cache_dir", str(work / "text"), "--output", str(work / "r.mp4")]
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *words], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0 ['torch']"
    assert torch.equal(read_latent(work / "r.latent.safetensors")[0], base)
    assert "Traceback" not in done.stderr


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_given_images_are_in_the_result(work: Path, monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """Trap B9: the last image is used, and given frames are put back after the last step."""
    seen: list[Any] = []
    original = clips_module.denoise

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(arguments[6])
        return original(*arguments)

    monkeypatch.setattr(clips_module, "denoise", watched)
    for name, colour in (("first", (200, 30, 30)), ("last", (30, 30, 200))):
        Image.new("RGB", (80, 64), colour).save(work / f"{name}.png")
    words = ["--task", "k5-demo-i2v", "--image", str(work / "first.png"), "--frames", "17"]
    words += ["--image_last", str(work / "last.png")] if last else []
    found = _one(work, f"i2v {last}", *words)
    (given,) = seen
    assert torch.equal(found[:, 0], given.first[0, 0].permute(2, 0, 1))
    assert (given.last is not None) == last
    if last:
        assert torch.equal(found[:, -1], given.last[0, 0].permute(2, 0, 1))
        assert not torch.equal(given.first, given.last)


def test_long_clips_from_an_image_are_matched_to_their_later_frames(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap B9: the normalisation of the first frames runs after the loop, for 9 latent frames and more."""
    kept: list[torch.Tensor] = []
    original = clips_module.denoise

    def watched(*arguments: Any) -> torch.Tensor:
        kept.append(original(*arguments))
        return kept[0]

    monkeypatch.setattr(clips_module, "denoise", watched)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(work / "red.png")
    words = ("--task", "k5-demo-i2v", "--image", str(work / "red.png"), "--frames", "33", "--steps", "1")
    found = _one(work, "long i2v", *words)
    expected = normalise_first_frames(kept[0])[0].permute(3, 0, 1, 2)
    assert torch.equal(found, expected)
    assert not torch.equal(found, kept[0][0].permute(3, 0, 1, 2))
    assert torch.equal(found[:, 4:], kept[0][0].permute(3, 0, 1, 2)[:, 4:])


# --- memory and formats -------------------------------------------------------------------------------------------


def test_eight_bit_weights_stay_close(base: torch.Tensor, work: Path) -> None:
    difference = _relative(_one(work, "fp8", "--fp8_base"), base)
    print(f"latents with --fp8_base differ by {difference:.4f}")
    assert 0 < difference < 0.05


def test_bfloat16_stays_close(base: torch.Tensor, work: Path) -> None:
    difference = _relative(_one(work, "bf16", "--dtype", "bfloat16"), base)
    print(f"latents in bfloat16 differ by {difference:.4f}")
    assert 0 < difference < 0.05


def test_swapping_blocks_on_a_cpu_says_that_it_does_nothing(base: torch.Tensor, work: Path) -> None:
    run = run_command(work / "swap", *LATENT, "--prompt", PROMPT, "--blocks_to_swap", "2")
    assert [(record["field"], "CPU" in record["message"]) for record in run.of("warning")] == [("blocks_to_swap", True)]
    assert torch.equal(_latents(run)[0], base)


# --- stopping and failing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("request_name", "clips"), [("stop", 1), ("stop_and_save", 2)])
def test_stopping_in_the_second_clip(
    base: torch.Tensor, work: Path, monkeypatch: pytest.MonkeyPatch, request_name: str, clips: int
) -> None:
    folder = work / request_name
    original = StepMeter.step

    def step(self: StepMeter, item: int, number: int, steps: int) -> None:
        original(self, item, number, steps)
        if (item, number) == (2, 1):
            (folder / "requests").mkdir()
            (folder / "requests" / request_name).touch()

    monkeypatch.setattr(StepMeter, "step", step)
    file = work / f"{request_name}.txt"
    file.write_text(f"{PROMPT}\n{PROMPT} --d 5\n{PROMPT} --d 6\n", "utf-8")
    run = run_command(folder, *LATENT, "--from_file", str(file))
    assert run.code == 0
    found = _latents(run)
    assert len(found) == clips
    assert torch.equal(found[0], base)
    assert [record["request"] for record in run.of("request_done")] == [request_name]
    assert len(run.of("stopped")) == 1
    assert run.events[-1]["type"] == "stopped"
    assert not run.of("finished") + run.of("error")
    if clips == 2:
        assert read_settings(run.files()[1])["computed"]["stopped_at_step"] == 1


def test_a_request_that_was_there_before_the_start(work: Path) -> None:
    (work / "early stop" / "requests").mkdir(parents=True)
    (work / "early stop" / "requests" / "stop").touch()
    run = run_command(work / "early stop", *LATENT, "--prompt", PROMPT)
    assert (run.code, run.of("step"), run.files()) == (0, [], [])
    assert run.events[-1]["type"] == "stopped"


def test_a_real_process_stops_between_two_steps(base: torch.Tensor, work: Path, repository: Path) -> None:
    folder = work / "process"
    command = [sys.executable, "-m", "backend.kandinsky5_generate_video", *LATENT[:2], "--steps", "1000"]
    command += ["--prompt", PROMPT, "--run_dir", str(folder), "--text_cache_dir", str(work / "text")]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not any(record["type"] == "step" for record in read_events(folder / "events.jsonl").records):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    (folder / "requests").mkdir()
    (folder / "requests" / "stop").touch()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in stderr
    types = [record["type"] for record in read_events(folder / "events.jsonl").records]
    assert types[-1] == "stopped"
    assert types.count("step") < 1000


def _broken(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_fault_of_the_engine_names_its_phase_and_exits_with_1(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips_module, "denoise", _broken(RuntimeError("shapes do not match")))
    run = run_command(work / "fault", *LATENT, "--prompt", PROMPT)
    assert run.code == 1
    (error,) = run.of("error")
    assert (error["phase"], error["exit_code"], error["problems"]) == ("denoise", 1, [])
    assert "shapes do not match" in error["message"]
    assert "Traceback" in run.stderr  # stderr is the log of a run folder
    assert run.files() == []


def test_running_out_of_memory_says_what_helps(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips_module, "denoise", _broken(torch.OutOfMemoryError("no memory")))
    run = run_command(work / "memory", *LATENT, "--prompt", PROMPT)
    assert run.code == 1
    assert "--fp8_base" in run.of("error")[0]["message"]


def test_numbers_that_are_none_are_never_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips_module, "denoise", lambda _, noise, *__: noise * float("nan"))
    run = run_command(work / "nan", *LATENT, "--prompt", PROMPT)
    assert run.code == 1
    assert "not numbers" in run.of("error")[0]["message"]
    assert run.files() == []
    assert not (work / "nan" / "outputs").exists()


def test_the_keyboard_stops_with_130(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips_module, "denoise", _broken(KeyboardInterrupt()))
    run = run_command(work / "keyboard", *LATENT, "--prompt", PROMPT)
    assert run.code == 130
    assert run.events[-1]["type"] == "stopped"
    assert "Traceback" not in run.stderr


def test_without_a_run_folder_the_traceback_goes_into_a_file(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clips_module, "denoise", _broken(RuntimeError("broken")))
    monkeypatch.setattr("tempfile.tempdir", str(work))
    words = [*LATENT, "--prompt", PROMPT, "--text_cache_dir", str(work / "text"), "--output", str(work / "x.mp4")]
    assert kandinsky5_generate_video.main(words) == 1
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (log,) = work.glob("k5-studio-*.log")
    assert str(log) in stderr
    assert "Traceback" in log.read_text("utf-8")
