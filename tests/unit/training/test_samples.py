"""Samples while training, on the demo model: right clips, loaded once, no trace in the training, never its end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import av.error
import numpy
import pytest
import torch
from PIL import Image

from backend.config.checks import weight_paths
from backend.config.metadata import read_settings
from backend.config.state_record import Position
from backend.config.train import TrainOptions
from backend.errors import Problems
from backend.events import Journal, read_events
from backend.model.attention import AttentionBackend
from backend.progress import Reporter
from backend.sampling import clip_vae, clips
from backend.training import samples as samples_module
from backend.training.samples import Sampler, add_to_manifest, shown_epoch
from backend.training.transformer import TrainingTransformer
from tests.integration.command import run_command
from tests.unit.model.trained import add_lora, switch_dropout

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
CPU = torch.device("cpu")
PROMPT = "a red circle moves left on a black background"
HERE = Position(step=500, epoch=2, batch=7)
SHORT = "--f 5 --s 2"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of text embeddings that all tests share."""
    return tmp_path_factory.mktemp("sampling") / "text"


class Bench:
    """A sampler with its own run folder and prompt file, and a model that learns."""

    def __init__(self, folder: Path, texts: Path, prompts: str, task: str, seed: int, **options: Any) -> None:
        self.run, self.prompts = folder / "run", folder / "prompts.txt"
        self.prompts.write_text(prompts, "utf-8")
        self.run.mkdir(exist_ok=True)
        self.journal = Journal(self.run / "events.jsonl")
        self.reporter = Reporter(self.journal, self.run, io.StringIO())
        self.options = TrainOptions(
            task=task, sample_prompts=str(self.prompts), output_name="shape", text_cache_dir=str(texts), **options
        )
        self.paths = weight_paths(self.options)
        self.samples = self.run / "samples"
        self.sampler = Sampler(self.options, self.paths, CPU, torch.float32, self.reporter, self.samples, seed)
        self._transformer: TrainingTransformer | None = None

    @property
    def transformer(self) -> TrainingTransformer:
        if self._transformer is None:
            self._transformer = TrainingTransformer(
                self.options, self.paths, CPU, torch.float32, AttentionBackend("sdpa")
            )
        return self._transformer

    def make(self, here: Position = HERE, **named: Any) -> int:
        return self.sampler.make(self.transformer, here, **named)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [dict(record) for record in read_events(self.run / "events.jsonl").records if record["type"] == kind]

    def manifest(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.samples / "manifest.jsonl").read_text("utf-8").splitlines()]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.samples.iterdir())


@pytest.fixture
def bench(tmp_path: Path, texts: Path) -> Callable[..., Bench]:
    """Makes a `Bench`."""

    def make(prompts: str, task: str = "k5-demo-t2v", seed: int = 11, **options: Any) -> Bench:
        return Bench(tmp_path, texts, prompts, task, seed, **options)

    return make


def _frames(path: Path) -> numpy.ndarray:
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _broken(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


# --- what is made -------------------------------------------------------------------------------------------------


def test_a_sample_is_the_clip_that_generation_makes(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Without a LoRA, bit for bit; the line's options all count. Trap T9: --f is in pixel frames."""
    found = bench(f"{PROMPT} --w 48 --h 80 --f 9 --d 3 --s 3 --g 1.5 --fs 4 --n blurry\n{PROMPT} --f 5 --s 2 --l 1\n")
    found.sampler.prepare()
    assert found.make() == 2
    first, second = (found.samples / f"shape-step000500-p0{number}.mp4" for number in (1, 2))
    assert found.names() == ["manifest.jsonl", first.name, second.name]
    assert (_frames(first).shape, _frames(second).shape) == ((9, 80, 48, 3), (5, 64, 64, 3))
    run = run_command(
        tmp_path / "generated", "--task", "k5-demo-t2v", "--from_file", str(found.prompts), "--seed", "11"
    )
    for path, expected in zip((first, second), run.files(), strict=True):
        assert numpy.array_equal(_frames(path), _frames(expected))
        ours, theirs = read_settings(path), read_settings(expected)
        assert ours["weights"] == theirs["weights"]
        assert ours["options"] == theirs["options"]
        assert ours["computed"]["training"]["step"] == 500
    assert read_settings(second)["seed"] == 11


def test_journal_and_manifest_say_what_was_made(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT} --d 3\na blue square --s 2 --f 1\n")
    found.sampler.prepare()
    found.make()
    record, still = found.of("sample")
    assert record.pop("took_seconds") > 0
    shown = {name: value for name, value in record.items() if name not in ("v", "seq", "t", "type")}
    assert shown == {
        "path": "samples/shape-step000500-p01.mp4", "kind": "video", "width": 64, "height": 64, "frames": 5, "fps": 24,
        "seconds": round(5 / 24, 4), "seed": 3, "prompt": PROMPT, "step": 500, "epoch": 3, "index": 1,
    }  # fmt: skip
    assert (still["path"], still["kind"], still["index"], still["seed"]) == (
        "samples/shape-step000500-p02.png", "image", 2, 11,
    )  # fmt: skip
    entries = found.manifest()
    assert [(e["step"], e["epoch"], e["prompt"], e["seed"], e["path"]) for e in entries] == [
        (500, 3, PROMPT, 3, "shape-step000500-p01.mp4"), (500, 3, "a blue square", 11, "shape-step000500-p02.png"),
    ]  # fmt: skip
    assert entries[0]["settings"]["steps"] == 2
    assert entries[0]["settings"]["frames"] == 5
    progress = [record for record in found.of("progress") if record["unit"] == "steps"]
    assert (progress[-1]["done"], progress[-1]["total"], progress[-1]["phase"]) == (4, 4, "sample")


def test_given_images_are_kept_to(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """Image to video with --i and --ei (trap B9: a peer ignores the last image)."""
    for name, colour in (("first", (200, 30, 30)), ("last", (30, 30, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    line = f"{PROMPT} --f 17 --s 2 --i {tmp_path / 'first.png'}"
    found = bench(f"{line}\n{line} --ei {tmp_path / 'last.png'}\n", task="k5-demo-i2v")
    found.sampler.prepare()
    assert found.make() == 2
    one, both = (_frames(found.samples / f"shape-step000500-p0{number}.mp4").mean((1, 2)) for number in (1, 2))
    assert one[0][0] > one[0][2] + 60
    assert both[0][0] > both[0][2] + 60
    assert both[-1][2] > both[-1][0] + 60
    assert not numpy.array_equal(one[-1], both[-1])


def test_everything_is_loaded_and_encoded_once(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap B21: a peer loads text encoders and VAE again for every prompt of every sampling."""
    from backend.text import encoders

    counts: dict[str, int] = {}

    def count(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, attribute, counted)

    count("qwen", encoders.QwenEncoder, "__init__")
    count("clip", encoders.ClipEncoder, "__init__")
    count("vae", clip_vae, "load_vae")
    count("image", clip_vae, "load_image")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "first.png")
    image = f"--i {tmp_path / 'first.png'}"
    found = bench(f"a green ring {SHORT} {image}\na white star {SHORT} {image}\n", task="k5-demo-i2v")
    found.sampler.prepare()
    for step in (1, 2):
        assert found.make(Position(step, 0, step)) == 2
    assert counts == {"qwen": 1, "clip": 1, "vae": 1, "image": 2}


def test_the_lora_is_sampled_as_it_is_now_and_without_dropout(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT}\n")
    found.sampler.prepare()
    parameters = add_lora(found.transformer.model)
    switch_dropout(found.transformer.model, True)
    pictures = []
    for step in (1, 2, 3):
        if step == 3:
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.mul_(2)
        found.make(Position(step, 0, step))
        pictures.append(_frames(found.samples / f"shape-step{step:06d}-p01.mp4"))
    assert numpy.array_equal(pictures[0], pictures[1])
    assert not numpy.array_equal(pictures[1], pictures[2])
    assert all(module.training for module in found.transformer.model.modules() if hasattr(module, "add_to"))


def test_training_after_a_sample_is_training_without_one_bit_for_bit(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT}\n", offload_dit_during_sampling=True)
    found.sampler.prepare()
    transformer = found.transformer
    parameters = add_lora(transformer.model)
    switch_dropout(transformer.model, True)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    channels, text, pooled = (transformer.config.in_channels, transformer.config.in_text_dim, 64)

    def train(sampling: bool) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start[name])
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        torch.manual_seed(1)
        for step in range(1, 4):
            if sampling:
                assert found.make(Position(step, 0, step)) == 1
            optimizer.zero_grad()
            latents = torch.randn(1, 2, 8, 8, channels)
            velocity = transformer.velocity(
                latents, torch.randn(1, 4, text), torch.randn(1, pooled), torch.tensor([500.0])
            )
            velocity.square().mean().backward()
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    without, with_samples = train(False), train(True)
    assert not torch.equal(next(iter(without.values())), next(iter(start.values())))
    assert all(torch.equal(with_samples[name], without[name]) for name in without)


# --- names --------------------------------------------------------------------------------------------------------


def test_the_same_step_again_replaces_and_other_settings_stand_beside(bench: Callable[..., Bench]) -> None:
    """A resumed run comes by a step a second time; a changed prompt file is another clip and destroys nothing."""
    for line in (f"{PROMPT} {SHORT}", f"{PROMPT} {SHORT}", f"{PROMPT} {SHORT} --d 4", f"{PROMPT} {SHORT} --d 4"):
        found = bench(f"{line}\n")
        found.sampler.prepare()
        assert found.make() == 1
        found.journal.close()
    assert found.names() == ["manifest.jsonl", "shape-step000500-p01-2.mp4", "shape-step000500-p01.mp4"]
    assert [(entry["path"], entry["seed"]) for entry in found.manifest()] == [
        ("shape-step000500-p01.mp4", 11), ("shape-step000500-p01-2.mp4", 4),
    ]  # fmt: skip


def test_a_file_of_somebody_else_is_never_replaced(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT}\n")
    found.samples.mkdir()
    (found.samples / "shape-step000500-p01.mp4").write_bytes(b"holiday")
    found.sampler.prepare()
    assert found.make() == 1
    assert (found.samples / "shape-step000500-p01.mp4").read_bytes() == b"holiday"
    assert "shape-step000500-p01-2.mp4" in found.names()


def test_a_drawn_seed_is_the_same_at_every_step_and_after_a_resume(bench: Callable[..., Bench]) -> None:
    seeds = []
    for _ in range(2):
        found = bench(f"{PROMPT} {SHORT} --d -1\n{PROMPT} {SHORT} --d -1\n")
        found.sampler.prepare()
        seeds.append([clip.request.seed for clip in found.sampler._clips])
        found.journal.close()
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], 11}) == 3


def test_epochs_are_counted_as_people_do() -> None:
    places = [Position(0, 0, 0), Position(3, 0, 3), Position(10, 1, 0), Position(11, 1, 1)]
    assert [shown_epoch(place) for place in places] == [0, 1, 1, 2]


def test_the_manifest_keeps_lines_that_it_does_not_understand(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"path": "a.mp4", "step": 1}\ntorn {\n[1]\n', "utf-8")
    add_to_manifest(path, {"path": "b.mp4", "step": 2})
    add_to_manifest(path, {"path": "a.mp4", "step": 3})
    assert path.read_text("utf-8").splitlines() == [
        "torn {", "[1]", '{"path": "b.mp4", "step": 2}', '{"path": "a.mp4", "step": 3}',
    ]  # fmt: skip


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_mistakes_in_the_prompt_file_are_said_before_training(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} --w 50\n--d 3\n{PROMPT} --x 1\n")
    with pytest.raises(Problems) as caught:
        found.sampler.prepare()
    assert {problem.field for problem in caught.value.problems} == {"sample_prompts"}
    shown = "\n".join(problem.message for problem in caught.value.problems)
    assert all(word in shown for word in ("line 1: width", "line 2", "line 3: --x"))


def test_forced_nabla_needs_samples_of_its_sizes(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT}\n{PROMPT} {SHORT} --w 128 --h 128\n", force_nabla_attention=True)
    with pytest.raises(Problems, match="prompt 1: NABLA attention needs") as caught:
        found.sampler.prepare()
    assert len(caught.value.problems) == 1


def test_an_image_that_cannot_be_decoded_costs_its_own_samples_only(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    lines = [f"{PROMPT} {SHORT} --i {tmp_path / name}.jpg" for name in ("bad", "good")]
    found = bench("\n".join(lines), task="k5-demo-i2v")
    found.sampler.prepare()
    (warning,) = found.of("warning")
    assert warning["field"] == "sample_prompts"
    assert "sample 1 will not be made: " in warning["message"]
    assert "bad.jpg cannot be decoded" in warning["message"]
    assert found.make() == 1
    assert [record["index"] for record in found.of("sample")] == [2]


_FAILURES = {
    "denoise": (clips, "denoise", torch.OutOfMemoryError("no memory"), "ran out of memory"),
    "shapes": (clips, "denoise", RuntimeError("shapes do not match"), "Denoising sample 1: shapes do not match."),
    "decode": (clip_vae.ClipVae, "decode", torch.OutOfMemoryError("no memory"), "ran out of memory"),
    "save": (samples_module, "save_clip", OSError(28, "No space left on device"), "No space left"),
    "codec": (samples_module, "save_clip", av.error.ExternalError(1, "encoder broke"), "encoder broke"),
    "manifest": (samples_module, "add_to_manifest", PermissionError(13, "Permission denied"), "Permission denied"),
    "bug": (clips, "denoise", KeyError("lost"), "'lost'."),
}


@pytest.mark.parametrize("where", _FAILURES)
def test_a_failing_sample_warns_and_training_goes_on(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    owner, name, error, words = _FAILURES[where]
    found = bench(f"{PROMPT} {SHORT}\na blue square {SHORT}\n", offload_dit_during_sampling=True)
    found.sampler.prepare()
    moves: list[str] = []
    monkeypatch.setattr(found.transformer, "to_cpu", lambda: moves.append("host"))
    monkeypatch.setattr(found.transformer, "to_device", lambda: moves.append("device"))
    add_lora(found.transformer.model)
    switch_dropout(found.transformer.model, True)
    original, calls = getattr(owner, name), []

    def fails_first(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, fails_first)
    before = torch.get_rng_state()
    assert found.make() == 1
    (warning,) = found.of("warning")
    assert warning["field"] == "sample_prompts"
    assert warning["message"].startswith("sample 1 of step 500 was not made: ")
    assert words in warning["message"]
    assert warning["message"].endswith("Training goes on.")
    assert [record["index"] for record in found.of("sample")] == [2]
    assert moves[-1] == "device"
    assert moves.count("host") == (1 if where in ("denoise", "shapes", "bug") else 2)
    assert all(module.training for module in found.transformer.model.modules() if hasattr(module, "add_to"))
    assert torch.equal(torch.get_rng_state(), before)
    assert not [path for path in found.samples.iterdir() if path.name.startswith(".")]


def test_numbers_that_are_none_are_never_written(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(f"{PROMPT} {SHORT}\n")
    found.sampler.prepare()
    monkeypatch.setattr(clips, "denoise", lambda _, noise, *__: noise * float("nan"))
    assert found.make() == 0
    assert "not numbers" in found.of("warning")[0]["message"]
    assert not found.samples.exists()


def test_the_keyboard_is_no_failing_sample(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    found = bench(f"{PROMPT} {SHORT}\n")
    found.sampler.prepare()
    monkeypatch.setattr(clips, "denoise", _broken(KeyboardInterrupt()))
    found.reporter.phase_name = "train"
    with pytest.raises(KeyboardInterrupt):
        found.make()
    assert found.reporter.phase_name == "train"


def test_a_request_to_stop_is_heard_between_the_steps(bench: Callable[..., Bench]) -> None:
    found = bench(f"{PROMPT} {SHORT}\n{PROMPT} {SHORT} --d 2\n{PROMPT} {SHORT} --d 3\n")
    found.sampler.prepare()
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) >= 6  # The first clip asks three times; the second one stops before its second step.

    assert found.make(interrupted=interrupted) == 1
    assert len(asked) == 7
    assert found.names() == ["manifest.jsonl", "shape-step000500-p01.mp4"]
    assert found.of("warning") == []
