"""The guide's training command on the demo weights and real clips: it runs, and every flag of it does something."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open

from backend.model.checkpointing import _run_checkpointed
from backend.model.quantize import Fp8Linear
from backend.training.loop import Parts, TrainingLoop
from backend.training.state import Position
from backend.training.step_meter import StepFacts, TrainingMeter
from tests.integration.command import Run
from tests.integration.training_runs import PATHS, SMALL, guide_words, same, train, weights


class Guide(NamedTuple):
    """The guide's run: what was said, what the loop worked with, and the reading threads at each step."""

    run: Run
    parts: Parts
    readers: list[set[threading.Thread]]
    out: Path


class Seen:
    """Looks into a run from inside."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.parts: list[Parts] = []
        self.readers: list[set[threading.Thread]] = []
        begin, step = TrainingLoop.__init__, TrainingMeter.step

        def beginning(loop: TrainingLoop, parts: Parts, position: Position) -> None:
            self.parts.append(parts)
            begin(loop, parts, position)

        def stepping(meter: TrainingMeter, facts: StepFacts) -> dict[str, Any]:
            threads = {thread for thread in threading.enumerate() if thread.name.startswith("k5-batches")}
            self.readers.append(threads)
            return step(meter, facts)

        patch.setattr(TrainingLoop, "__init__", beginning)
        patch.setattr(TrainingMeter, "step", stepping)


@pytest.fixture(scope="module")
def guide(training_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    """The guide's words, with fewer steps: two epochs, a warm-up of 10 steps."""
    folder = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        run = train(folder / "run", training_data, *guide_words(folder / "out", warmup=10, epochs=2), "--seed", 5)
        assert run.code == 0, run.stderr
        yield Guide(run, seen.parts[0], seen.readers, folder / "out")


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_length_names_and_saves(guide: Guide) -> None:
    """--max_train_epochs, --save_every_n_epochs (never at the last), --output_dir, --output_name, --dataset_config."""
    assert [record["step"] for record in guide.run.of("step")] == list(range(1, 15)), "7 items, twice"
    assert sorted(path.name for path in guide.out.iterdir()) == ["k5_lora-000001.safetensors", "k5_lora.safetensors"]
    assert [(record["why"], record["epoch"]) for record in guide.run.of("checkpoint")] == [("epoch", 1), ("end", 2)]
    assert guide.run.of("finished")[0]["outputs"] == [
        str(guide.out / "k5_lora-000001.safetensors"),
        str(guide.out / "k5_lora.safetensors"),
    ]


def test_model_and_memory(guide: Guide) -> None:
    """--task, --dit, --mixed_precision, --fp8_base, --gradient_checkpointing, --sdpa."""
    model = guide.parts.transformer.model
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) >= 62, "every layer that is trained stands on 8-bit weights"
    assert model.dtype == torch.bfloat16
    assert getattr(model.run_block, "func", None) is _run_checkpointed
    assert guide.parts.transformer.attention == "sdpa"
    facts = metadata(guide.out / "k5_lora.safetensors")
    expected = {
        "k5_task": "k5-demo-t2v", "ss_sd_model_name": Path(str(PATHS.dit)).name, "ss_mixed_precision": "bf16",
        "ss_fp8_base": "True", "ss_gradient_checkpointing": "True", "ss_seed": "5", "ss_num_train_items": "7",
        "ss_vae_name": Path(str(PATHS.vae)).name, "k5_scheduler_scale": "10.0", "ss_steps": "14", "ss_num_epochs": "2",
        "ss_lr_warmup_steps": "10", "ss_timestep_sampling": "shift", "ss_discrete_flow_shift": "5.0",
    }  # fmt: skip
    assert {name: facts.get(name) for name in expected} == expected
    assert len(facts["sshs_model_hash"]) == 64


def test_network(guide: Guide) -> None:
    """--network_module, --network_dim, --network_alpha; something was learned."""
    tensors = weights(guide.out / "k5_lora.safetensors")
    downs = [tensor for name, tensor in tensors.items() if name.endswith("lora_down.weight")]
    assert len(downs) == 62
    assert {tensor.shape[0] for tensor in downs} == {32}
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {32.0}
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_up" in name)


def test_optimizer_and_schedule(guide: Guide) -> None:
    """--optimizer_type as the guide spells it, --optimizer_args, --learning_rate, --lr_scheduler, --lr_warmup_steps."""
    optimizer = guide.parts.optimizer
    assert type(optimizer).__name__ == "AdamW8bit"
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["betas"]) == (0.001, (0.9, 0.95))
    rates = [record["lr"] for record in guide.run.of("step")]
    assert rates == pytest.approx([*(1e-5 * step for step in range(10)), *[1e-4] * 4])


def test_readers(guide: Guide) -> None:
    """--max_data_loader_n_workers 1 reads with one thread, --persistent_data_loader_workers keeps it over the epoch."""
    assert all(len(readers) == 1 for readers in guide.readers[:-1])
    assert len(set().union(*guide.readers)) == 1


@pytest.mark.parametrize(("words", "most"), [((), 2), (("--max_data_loader_n_workers", 0), 0)])
def test_without_persistent_readers(
    words: tuple[Any, ...], most: int, training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    run = train(tmp_path / "run", training_data, *SMALL, "--max_train_steps", 8, *words)
    assert run.code == 0, run.stderr
    assert max(map(len, seen.readers)) == most
    if most:
        assert not seen.readers[0] & seen.readers[7], "the second epoch has threads of its own"


def test_largest_gradient_norm(training_data: Path, tmp_path: Path) -> None:
    """--max_grad_norm: with plain gradient descent at rate 1, the first step is as long as the clipped gradient."""
    lengths = {}
    for limit in (0.01, 1e6):
        folder = tmp_path / str(limit)
        words = (*SMALL, "--optimizer_type", "SGD", "--learning_rate", 1, "--max_train_steps", 1)
        run = train(folder, training_data, *words, "--max_grad_norm", limit)
        assert run.code == 0, run.stderr
        ups = [tensor for name, tensor in weights(folder / "checkpoints/my.safetensors").items() if "lora_up" in name]
        lengths[limit] = float(torch.cat([up.flatten() for up in ups]).norm())
        norm = run.of("step")[0]["grad_norm"]
    assert norm > 0.01
    assert lengths == {0.01: pytest.approx(0.01, rel=1e-3), 1e6: pytest.approx(norm, rel=1e-3)}


def test_timesteps(training_data: Path, tmp_path: Path) -> None:
    """--timestep_sampling shift --discrete_flow_shift: far to noise or far to the clean clip, as the bands show."""
    bands = {}
    for shift in (0.01, 500):
        words = (*SMALL, "--max_train_steps", 7, "--timestep_sampling", "shift", "--discrete_flow_shift", shift)
        run = train(tmp_path / str(shift), training_data, *words)
        counted = [sum(record["band_loss"][band] is not None for record in run.of("step")) for band in range(5)]
        bands[shift] = counted
    assert bands[0.01][0] >= 6
    assert bands[500][4] >= 6
    assert sum(bands[500][:4]) + sum(bands[0.01][1:]) <= 2


def test_gradient_checkpointing_changes_nothing_that_is_learned(training_data: Path, tmp_path: Path) -> None:
    words = (*SMALL, "--max_train_steps", 3, "--network_dropout", 0.3)
    for name, more in (("plain", ()), ("checkpointed", ("--gradient_checkpointing",))):
        assert train(tmp_path / name, training_data, *words, *more).code == 0
    file = "checkpoints/my.safetensors"
    assert same(tmp_path / "plain" / file, tmp_path / "checkpointed" / file)
    quantised = train(tmp_path / "fp8", training_data, *words, "--fp8_base")
    assert quantised.code == 0
    assert not same(tmp_path / "plain" / file, tmp_path / "fp8" / file), "--fp8_base trains on rounded weights"


def test_weights_are_checked_before_anything_is_loaded(training_data: Path, tmp_path: Path) -> None:
    """--dit, --vae, --text_encoder_qwen and --text_encoder_clip: all that is wrong is said at once."""
    given = ("--dit", PATHS.vae, "--vae", PATHS.dit, "--text_encoder_qwen", tmp_path / "none")
    run = train(tmp_path / "run", training_data, *SMALL, *given, "--text_encoder_clip", PATHS.dit)
    assert run.code == 2
    (error,) = run.of("error")
    assert {problem["field"] for problem in error["problems"]} == {
        "dit", "vae", "text_encoder_qwen", "text_encoder_clip"
    }  # fmt: skip
