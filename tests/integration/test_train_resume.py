"""Going on from a state: as if nothing had happened, bit for bit (trap T17)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import Run
from tests.integration.training_runs import SMALL, ask_after_step, same, train, weights, write_config

# Steps of an epoch take 2, 2 and 1 batches; step 10 is the first one of the fourth epoch.
EVERYTHING = (
    *SMALL, "--max_train_steps", 20, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant_with_warmup",
    "--lr_warmup_steps", 15, "--network_dropout", 0.2, "--network_args", "rank_dropout=0.2", "module_dropout=0.1",
    "--num_timestep_buckets", 4, "--scale_weight_norms", 0.5, "--save_state_on_train_end",
)  # fmt: skip


@pytest.fixture
def batches(training_data: Path, tmp_path: Path) -> Path:
    """Four batches of a clip and one of two stills, captions that are dropped, one clip held out."""
    clips = "caption_dropout = 0.5\nvalidation_split = 0.2"
    return write_config(training_data.parent, tmp_path / "batches.toml", clips=clips, stills="batch_size = 2")


def steps(run: Run) -> dict[int, dict[str, Any]]:
    """What may not depend on an interruption, of every step."""
    kept = ("total", "epoch", "epochs", "loss", "lr", "grad_norm", "band_loss", "max_norm")
    return {record["step"]: {name: record.get(name) for name in kept} for record in run.of("step")}


def state_bytes(run: Run, name: str) -> dict[str, bytes]:
    """The tensors of a state: LoRA, optimizer and whatever else was saved."""
    return {path.name: path.read_bytes() for path in (run.folder / "checkpoints" / name).glob("optimizer*.safetensors")}


def test_ten_and_ten_steps_are_twenty(batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T17, with dropouts, dropped captions, accumulation, warm-up, strata and a stop in the middle of an epoch."""
    whole = train(tmp_path / "whole", batches, *EVERYTHING)
    assert whole.code == 0, whole.stderr
    with monkeypatch.context() as patch:
        ask_after_step(patch, tmp_path / "first", {10: "stop_and_save"})
        first = train(tmp_path / "first", batches, *EVERYTHING)
    assert first.code == 0, first.stderr
    (stopped,) = first.of("stopped")
    assert stopped["step"] == 10
    assert not first.of("finished")
    assert [record["step"] for record in first.of("request_done")] == [10]
    states = [record["path"] for record in first.of("checkpoint") if record["kind"] == "state"]
    assert states == ["checkpoints/my-step00000010-state"]
    second = train(tmp_path / "second", batches, *EVERYTHING, "--resume", tmp_path / "first" / states[0])
    assert second.code == 0, second.stderr

    assert sorted(steps(whole)) == list(range(1, 21))
    assert steps(whole)[11]["epoch"] == 4, "the stop was in the middle of an epoch"
    assert steps(first) | steps(second) == steps(whole)
    assert min(steps(second)) == 11
    assert same(whole.folder / "checkpoints/my.safetensors", second.folder / "checkpoints/my.safetensors")
    assert not same(
        whole.folder / "checkpoints/my.safetensors", first.folder / "checkpoints/my-step00000010.safetensors"
    )
    optimizers = state_bytes(whole, "my-state"), state_bytes(second, "my-state")
    assert optimizers[0]
    assert optimizers[0] == optimizers[1]
    (resumed,) = [record for record in second.of("phase") if record["phase"] == "resume"]
    assert (resumed["step"], resumed["epoch"]) == (10, 4)
    validations = {record["step"]: record["loss"] for record in whole.of("validation")}
    assert {0, 3, 18, 20} <= set(validations)
    assert {record["step"]: record["loss"] for record in second.of("validation")}.items() <= validations.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("--optimizer_type", "AdamW8bit"),
        ("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False"),
        ("--optimizer_type", "prodigyopt.Prodigy", "--learning_rate", 1),
        ("--optimizer_type", "schedulefree.AdamWScheduleFree", "--lr_scheduler", "constant", "--lr_warmup_steps", 0),
        ("--optimizer_type", "SGD", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10%"),
    ],
    ids=["8bit", "adafactor", "prodigy", "schedule-free", "sgd"],
)
def test_other_optimizers_go_on_exactly_too(
    words: tuple[Any, ...], batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", batches, *EVERYTHING, *words)
    with monkeypatch.context() as patch:
        ask_after_step(patch, tmp_path / "first", {7: "stop_and_save"})
        train(tmp_path / "first", batches, *EVERYTHING, *words)
    state = tmp_path / "first/checkpoints/my-step00000007-state"
    second = train(tmp_path / "second", batches, *EVERYTHING, *words, "--resume", state)
    assert (whole.code, second.code) == (0, 0), whole.stderr + second.stderr
    assert {step: record for step, record in steps(whole).items() if step > 7} == steps(second)
    assert same(whole.folder / "checkpoints/my.safetensors", second.folder / "checkpoints/my.safetensors")


def test_latest_goes_on_from_the_newest_whole_state(batches: Path, tmp_path: Path) -> None:
    saving = ("--output_dir", tmp_path / "out", "--save_every_n_steps", 2, "--save_state", "--max_train_steps", 5)
    words = (*SMALL, *saving)
    nothing = train(tmp_path / "none", batches, *words, "--resume", "latest")
    assert nothing.code == 2
    assert "--resume: there is no whole state of my" in nothing.stderr
    assert train(tmp_path / "a", batches, *words).code == 0
    (tmp_path / "out/my-state/COMPLETE.json").unlink()
    again = train(tmp_path / "b", batches, *words, "--resume", "latest")
    assert again.code == 0, again.stderr
    assert [record["step"] for record in again.of("step")] == [5]
    done = train(tmp_path / "c", batches, *words, "--resume", "latest")
    assert done.code == 2
    assert "nothing is left to do" in done.stderr
    longer = train(tmp_path / "d", batches, *words, "--resume", "latest", "--max_train_steps", 6)
    assert [record["step"] for record in longer.of("step")] == [6]


def test_what_does_not_fit_the_state_is_refused_and_what_changes_its_meaning_is_told(
    batches: Path, training_data: Path, tmp_path: Path
) -> None:
    words = (*SMALL, "--max_train_steps", 4)
    assert train(tmp_path / "a", batches, *words, "--save_state").code == 0
    state = tmp_path / "a/checkpoints/my-state"
    refused = train(tmp_path / "b", batches, *words, "--resume", state, "--network_dim", 8)
    assert refused.code == 2
    assert "--network_dim:" in refused.stderr
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    words = (*words, "--max_train_steps", 6, "--resume", state)
    told = train(tmp_path / "c", batches, *words, "--learning_rate", 5e-4)
    assert told.code == 0, told.stderr
    assert "learning_rate" in {record["field"] for record in told.of("warning")}
    assert {record["lr"] for record in told.of("step")} == {5e-4}
    # Another dataset: its batches are others, so the epoch begins again.
    other = train(tmp_path / "d", training_data, *words)
    assert other.code == 0, other.stderr
    assert "dataset_fingerprint" in {record["field"] for record in other.of("warning")}
    assert weights(tmp_path / "d/checkpoints/my.safetensors")
