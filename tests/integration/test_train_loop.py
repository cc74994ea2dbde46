"""What happens between the steps: saves, requests, samples, validation, numbers that are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.config.state_record import Position, read_record
from backend.training import loop as loop_module
from backend.training.inputs import ModelInputs
from backend.training.loss import flow_loss
from tests.integration.command import Run
from tests.integration.training_runs import SMALL, ask, ask_after_step, same, train, weights, write_config

LORA = "checkpoints/my.safetensors"


def checkpoints(run: Run) -> list[tuple[str, str, str]]:
    """(why, kind, name) of every checkpoint in the journal, all of which must exist unless they were deleted."""
    return [
        (record["why"], record["kind"], record["path"].removeprefix("checkpoints/")) for record in run.of("checkpoint")
    ]


def phases(run: Run) -> list[str]:
    return [record["phase"] for record in run.of("phase")]


# --- saves --------------------------------------------------------------------------------------------------------


def test_saves_by_step_and_epoch_have_the_known_names(training_data: Path, tmp_path: Path) -> None:
    """7 steps an epoch. The last epoch and the last step are saved by the end alone, once."""
    words = ("--max_train_epochs", 2, "--save_every_n_epochs", 1, "--save_every_n_steps", 7, "--save_state")
    run = train(tmp_path / "run", training_data, *SMALL, *words)
    assert run.code == 0, run.stderr
    assert checkpoints(run) == [
        ("epoch", "lora", "my-000001.safetensors"),
        ("epoch", "state", "my-000001-state"),
        ("step", "lora", "my-step00000007.safetensors"),
        ("step", "state", "my-step00000007-state"),
        ("end", "lora", "my.safetensors"),
        ("end", "state", "my-state"),
    ]
    assert all((run.folder / record["path"]).exists() for record in run.of("checkpoint"))
    assert read_record(run.folder / "checkpoints/my-000001-state", hashes=True).position == Position(7, 1, 0)
    assert phases(run)[-1] == "train"


def test_a_seed_that_nobody_gave_is_recorded_and_repeats_the_run(training_data: Path, tmp_path: Path) -> None:
    words = [*SMALL[: SMALL.index("--seed")], *SMALL[SMALL.index("--seed") + 2 :], "--max_train_steps", 2]
    first = train(tmp_path / "first", training_data, *words)
    seeds = [record["seed"] for record in first.of("phase") if "seed" in record]
    again = train(tmp_path / "again", training_data, *words, "--seed", seeds[0])
    other = train(tmp_path / "other", training_data, *words)
    assert (first.code, again.code, other.code) == (0, 0, 0)
    assert same(first.folder / LORA, again.folder / LORA)
    assert not same(first.folder / LORA, other.folder / LORA)


# --- requests -----------------------------------------------------------------------------------------------------


def test_save_is_answered_within_a_step_and_again(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_after_step(monkeypatch, tmp_path / "run", {2: "save", 4: "save"})
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 6)
    assert run.code == 0, run.stderr
    answers = [(record["request"], record["step"]) for record in run.of("request_done")]
    assert answers == [("save", 2), ("save", 4)]
    names = [name for why, kind, name in checkpoints(run) if why == "request" and kind == "lora"]
    assert names == ["my-step00000002.safetensors", "my-step00000004.safetensors"]
    assert not (run.folder / "requests" / "save").exists()


def test_stop_ends_without_saving(training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_after_step(monkeypatch, tmp_path / "run", {3: "stop"})
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 6)
    assert run.code == 0
    assert [record["step"] for record in run.of("step")] == [1, 2, 3]
    assert not checkpoints(run)
    assert run.of("stopped")[0]["step"] == 3
    assert "Nothing was saved" in run.of("stopped")[0]["reason"]


def test_a_stop_before_the_first_step_loads_no_model(training_data: Path, tmp_path: Path) -> None:
    ask(tmp_path / "run", "stop")
    run = train(tmp_path / "run", training_data, *SMALL)
    assert run.code == 0
    assert run.of("stopped")
    assert not run.of("step")
    assert "Loading the model" not in run.stderr
    again = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 1)
    assert again.of("finished"), "a stop that was answered does not end the next run in this folder"


def test_stop_after_epoch_finishes_it_and_saves(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_after_step(monkeypatch, tmp_path / "run", {2: "stop_after_epoch"})
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 30)
    assert run.code == 0
    assert run.of("request_done")[0]["step"] == 2
    assert max(record["step"] for record in run.of("step")) == 7
    assert checkpoints(run) == [
        ("stop", "lora", "my-step00000007.safetensors"), ("stop", "state", "my-step00000007-state")
    ]  # fmt: skip
    assert run.of("stopped")[0]["step"] == 7


# --- numbers that are not finite ----------------------------------------------------------------------------------


def break_losses(patch: pytest.MonkeyPatch, calls: Mapping[int, float]) -> None:
    """Multiply the loss of the n-th batch (from 1) by a number."""
    count = 0

    def breaking(velocity: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        loss, per_sample = flow_loss(velocity, inputs)
        factor = calls.get(count, 1.0)
        return loss * factor, per_sample * factor

    patch.setattr(loop_module, "flow_loss", breaking)


def test_a_step_that_is_not_finite_is_skipped_and_told(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer is not touched by it: what was learned is what two steps learn."""
    two = train(tmp_path / "two", training_data, *SMALL, "--max_train_steps", 2)
    break_losses(monkeypatch, {3: math.nan})
    three = train(tmp_path / "three", training_data, *SMALL, "--max_train_steps", 3)
    assert (two.code, three.code) == (0, 0)
    last = three.of("step")[2]
    assert last["skipped"] is True
    assert (last["loss"], last["grad_norm"]) == (None, None)
    assert not any("skipped" in record for record in three.of("step")[:2])
    assert same(two.folder / LORA, three.folder / LORA)


def test_the_first_step_may_be_skipped_too(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch warns when a schedule steps before its optimizer; a skipped first step is no mistake."""
    break_losses(monkeypatch, {1: math.inf})
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 2, "--gradient_accumulation_steps", 2)
    assert run.code == 0, run.stderr
    assert [record.get("skipped", False) for record in run.of("step")] == [True, False]


def test_too_many_in_a_row_end_the_run_with_the_reason(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, {2: math.nan, 4: math.nan, 5: math.nan, 6: math.nan})
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 9, "--max_nonfinite_steps", 3)
    assert run.code == 1
    (error,) = run.of("error")
    assert error["phase"] == "train"
    assert "3 steps in a row, up to step 6" in error["message"]
    assert not list(run.folder.rglob("*.safetensors"))


# --- samples and validation ---------------------------------------------------------------------------------------


def test_samples_at_first_by_step_and_on_request_leave_no_trace(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves right --w 32 --h 32 --f 5 --s 2 --d 3\n", "utf-8")
    words = (*SMALL, "--max_train_steps", 4, "--network_dropout", 0.2, "--gradient_accumulation_steps", 2)
    plain = train(tmp_path / "plain", training_data, *words)
    sampling = ("--sample_prompts", prompts, "--sample_every_n_steps", 3, "--sample_at_first")
    ask_after_step(monkeypatch, tmp_path / "run", {1: "sample"})
    run = train(tmp_path / "run", training_data, *words, *sampling, "--text_cache_dir", tmp_path / "text")
    assert (plain.code, run.code) == (0, 0), run.stderr
    assert [(record["step"], record["index"]) for record in run.of("sample")] == [(0, 1), (1, 1), (3, 1)]
    assert all(path.parent.name == "samples" for path in run.files())
    manifest = [json.loads(line) for line in (run.folder / "samples/manifest.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["seed"]) for entry in manifest] == [(0, 3), (1, 3), (3, 3)]
    assert [(record["request"], record["step"]) for record in run.of("request_done")] == [("sample", 1)]
    assert same(plain.folder / LORA, run.folder / LORA), "training after a sample is training without one"
    first, last = (run.folder / f"samples/my-step00000{step}-p01.mp4" for step in (0, 3))
    assert first.read_bytes() != last.read_bytes()


def test_validation_of_held_out_items(training_data: Path, tmp_path: Path) -> None:
    """By default before the first step, after each epoch and at the end; the numbers are those of fixed noise."""
    config = write_config(training_data.parent, tmp_path / "held.toml", clips="validation_split = 0.4", stills=None)
    words = (*SMALL, "--max_train_steps", 5, "--validation_timesteps", 2)
    run = train(tmp_path / "run", config, *words)
    assert run.code == 0, run.stderr
    found = run.of("validation")
    assert [(record["step"], record["epoch"], record["items"]) for record in found] == [(0, 0, 2), (3, 1, 2), (5, 2, 2)]
    assert all(len(record["by_sigma"]) == 2 for record in found)
    still = train(tmp_path / "still", config, *words, "--learning_rate", 0)
    assert len({record["loss"] for record in still.of("validation")}) == 1
    assert found[0]["loss"] == still.of("validation")[0]["loss"] != found[1]["loss"]
    none = train(tmp_path / "none", training_data, *SMALL, "--max_train_steps", 1, "--validate_every_n_steps", 1)
    assert [record["field"] for record in none.of("warning")] == ["validate_every_n_steps"]


def test_image_to_video_learns_on_frames_that_are_not_given(training_data: Path, tmp_path: Path) -> None:
    config = write_config(training_data.parent, tmp_path / "held.toml", clips="validation_split = 0.4", stills=None)
    words = [word if word != "k5-demo-t2v" else "k5-demo-i2v" for word in SMALL]
    run = train(tmp_path / "run", config, *words, "--max_train_steps", 12, "--i2v_mode", "first")
    assert run.code == 0, run.stderr
    losses = [record["loss"] for record in run.of("validation")]
    assert losses[-1] < losses[0]


# --- other ways to begin and to end -------------------------------------------------------------------------------


def test_timesteps_are_shown_and_nothing_is_trained(tmp_path: Path) -> None:
    run = train(tmp_path / "run", tmp_path / "none.toml", "--show_timesteps", "console")
    assert run.code == 0, run.stderr
    assert "shift" in run.stderr
    assert not run.of("step")


def test_missing_caches_are_named_or_made(training_data: Path, tmp_path: Path) -> None:
    """--cache_missing makes what is missing, in the same run, and leaves the rest alone."""
    from tests.integration.training_runs import copy_of

    folder = copy_of(training_data.parent, tmp_path / "data")
    config = write_config(folder, folder / "dataset.toml")
    gone = sorted((folder / "cache_clips").glob("bikes_0*.safetensors"))
    for path in gone:
        path.unlink()
    refused = train(tmp_path / "refused", config, *SMALL, "--max_train_steps", 1)
    assert refused.code == 2
    assert "--cache_missing" in refused.stderr
    kept = (folder / "cache_stills/bikes_k5_te.safetensors").stat().st_ino
    run = train(tmp_path / "run", config, *SMALL, "--max_train_steps", 1, "--cache_missing")
    assert run.code == 0, run.stderr
    assert all(path.is_file() for path in gone)
    assert (folder / "cache_stills/bikes_k5_te.safetensors").stat().st_ino == kept
    assert phases(run).index("cache") < phases(run).index("train")
    assert [record["type"] for record in run.events].count("started") == 1


def test_a_lora_to_start_from_and_its_rank(training_data: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", training_data, *SMALL, "--max_train_steps", 2, "--network_dim", 3)
    start = ("--network_weights", first.folder / LORA, "--max_train_steps", 1, "--learning_rate", 0)
    refused = train(tmp_path / "refused", training_data, *SMALL, *start)
    assert refused.code == 2
    assert "--network_weights" in refused.stderr
    run = train(tmp_path / "run", training_data, *SMALL, *start, "--dim_from_weights")
    assert run.code == 0, run.stderr
    found, expected = weights(run.folder / LORA), weights(first.folder / LORA)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), "at rate 0 nothing changes"


def test_groups_of_rates_and_limited_norms_are_recorded(training_data: Path, tmp_path: Path) -> None:
    words: tuple[Any, ...] = ("--network_args", "loraplus_lr_ratio=4", "--scale_weight_norms", 0.001)
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 3, *words)
    assert run.code == 0, run.stderr
    assert [record["lrs"] for record in run.of("step")] == [[1e-3, 4e-3]] * 3
    assert all(0 < record["max_norm"] <= 0.001001 for record in run.of("step"))


def test_curves_for_tensorboard(training_data: Path, tmp_path: Path) -> None:
    """--logging_dir, --log_prefix, --log_tracker_name, --log_config; paths stay out of what is shown."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ("--logging_dir", tmp_path / "logs", "--log_prefix", "mine_", "--log_tracker_name", "k5", "--log_config")
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 3, *words)
    assert run.code == 0, run.stderr
    (folder,) = (tmp_path / "logs").glob("mine_*/k5")
    curves = EventAccumulator(str(folder)).Reload()
    shown = [event.value for event in curves.Scalars("loss/current")]
    assert shown == pytest.approx([record["loss"] for record in run.of("step")])
    assert {"lr/unet", "loss/average", "grad_norm"} <= set(curves.Tags()["scalars"])
    (settings,) = folder.glob("*/hparams.yml")
    assert "learning_rate: 0.001" in settings.read_text()
    assert str(tmp_path) not in settings.read_text()
