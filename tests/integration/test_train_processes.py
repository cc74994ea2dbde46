"""Two processes train as one with twice the accumulation, write no file twice, and refuse launches that go wrong.

With FSDP too, where each has half of the frozen model: for that there is no sign but the parameters themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from torch import nn

from backend.config.state_record import read_record
from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.events import read_events
from backend.training.processes import Processes
from backend.training.sharding import _run_in_step
from backend.training.transformer import TrainingTransformer
from tests.conftest import REPOSITORY
from tests.integration.command import Run
from tests.integration.training_runs import PATHS, SMALL, same, train, weights, write_config

# Five batches an epoch: the last step of one has a single batch, so that the second process has none.
TRAINING = (
    *SMALL, "--max_train_steps", 5, "--network_args", "module_dropout=0.3", "rank_dropout=0.1",
    "--lr_scheduler", "linear", "--save_every_n_epochs", 1, "--save_state",
)  # fmt: skip


@pytest.fixture
def batches(training_data: Path, tmp_path: Path) -> Path:
    clips = "batch_size = 2\ncaption_dropout = 0.5\nvalidation_split = 0.2\nnum_repeats = 2"
    return write_config(training_data.parent, tmp_path / "batches.toml", clips=clips, stills="batch_size = 2")


DDP = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("-m", "tests.fakes.audited_training"),
)
# Exactly the file that the docs show.
FSDP = (
    *("-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "docs/fsdp.yaml")),
    *("-m", "tests.fakes.sharded_training"),
)


def launch(folder: Path, config: Path, *words: object, launcher: tuple[str, ...] = DDP) -> Run:
    """Two processes of the real command on CPUs, through torch's launcher or accelerate's."""
    folder.mkdir()
    command = [
        *(sys.executable, *launcher, "--dataset_config", str(config), "--run_dir", str(folder)),
        *map(str, words),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "K5_AUDIT": str(folder)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    records = [dict(record) for record in read_events(folder / "events.jsonl").records]
    return Run(done.returncode, records, done.stderr, folder)


def test_two_processes_equal_one_with_accumulation_two(batches: Path, tmp_path: Path) -> None:
    two = launch(tmp_path / "two", batches, *TRAINING)
    assert two.code == 0, two.stderr[-3000:]
    one = train(tmp_path / "one", batches, *TRAINING, "--gradient_accumulation_steps", 2)
    assert one.code == 0, one.stderr

    (seeded,) = [record for record in two.of("phase") if "seed" in record]
    assert (seeded["distributed"], seeded["processes"], seeded["device"]) == ("MULTI_CPU", 2, "cpu")
    for key in ("epoch", "lr"):
        assert [record[key] for record in two.of("step")] == [record[key] for record in one.of("step")]
    for key in ("loss", "grad_norm"):
        values = [[record[key] for record in run.of("step")] for run in (two, one)]
        torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(values[1]), rtol=1e-5, atol=1e-6)
    file = "checkpoints/my.safetensors"
    found, expected = weights(two.folder / file), weights(one.folder / file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
    assert max(float(tensor.abs().max()) for name, tensor in found.items() if "lora_up" in name) > 1e-4

    written = [set((two.folder / f"writes-{rank}.txt").read_text().split("\n")[:-1]) for rank in range(2)]
    ours = [{path for path in paths if path.startswith(str(two.folder))} for paths in written]
    assert ours[0]
    assert not ours[0] & ours[1], "a file was written by both processes"
    assert all("rng-1" in path for path in ours[1])
    state = two.folder / "checkpoints/my-state"
    assert read_record(state, hashes=True).processes == 2
    generators = [json.loads((state / f"rng-{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert all(generators)
    saved = [record["path"] for record in two.of("checkpoint")]
    assert len(saved) == len(set(saved)) == 4
    assert [record["seq"] for record in two.events] == list(range(1, len(two.events) + 1)), "one writer of the journal"


def assert_numbers_alike(two: Run, one: Run, *, rtol: float, atol: float) -> None:
    """What the steps and the validations of two runs measured."""
    for kind, keys in (("step", ("loss", "grad_norm", "lr")), ("validation", ("loss",))):
        for key in keys:
            values = [[record[key] for record in run.of(kind)] for run in (two, one)]
            assert values[0]
            torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(values[1]), rtol=rtol, atol=atol)


def loras_of(*runs: Run) -> list[dict[str, torch.Tensor]]:
    """Their LoRAs, which have learned something."""
    found = [weights(run.folder / "checkpoints/my.safetensors") for run in runs]
    assert len({tuple(sorted(one)) for one in found}) == 1
    assert all(float(flat(one, "lora_up").abs().max()) > 1e-4 for one in found)
    return found


def flat(lora: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return torch.cat([lora[name].flatten() for name in sorted(lora) if part in name])


def assert_split(run: Run, blocks_dtypes: set[str]) -> None:
    """Each process stores half of every block's parameter and nothing else of it, before and after the training."""
    (seeded,) = [record for record in run.of("phase") if "seed" in record]
    assert (seeded["distributed"], seeded["processes"], seeded["device"]) == ("FSDP", 2, "cpu")
    for rank in range(2):
        facts = json.loads((run.folder / f"weights-{rank}.json").read_text("utf-8"))
        assert facts["before"] == facts["after"]
        kinds: dict[str, int] = {"block": 0, "lora": 0, "else": 0}
        dtypes = set()
        for name, (whole, stored, split, dtype) in facts["after"].items():
            kind = "lora" if ".branches." in name else "block" if "_blocks." in name else "else"
            kinds[kind] += 1
            if kind == "block":
                dtypes.add(dtype)
                assert split, name
                assert 2 * stored == whole, name
            else:
                assert not split, name
                assert stored >= whole, name
        assert min(kinds.values()) > 0, kinds
        assert dtypes == blocks_dtypes


class _Together(torch.autograd.Function):
    """Inputs of a block, whose gradients come back in one piece."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients


def run_together(block: nn.Module, *arguments: Any) -> torch.Tensor:
    """Run a block and sum the gradients of its inputs in FSDP's order, which rounds them as FSDP does."""
    passed = list(arguments)
    places = [place for place, value in enumerate(passed) if isinstance(value, torch.Tensor) and value.requires_grad]
    if places and torch.is_grad_enabled():
        for place, value in zip(places, _Together.apply(*(passed[place] for place in places)), strict=True):
            passed[place] = value
    return block(*passed)


@pytest.mark.slow
def test_with_fsdp_each_process_keeps_half_of_the_model(batches: Path, tmp_path: Path) -> None:
    """With checkpointing, validation and samples, in which both processes take part; and going on from a state.

    SGD, because AdamW makes whole steps of what is left of gradients that are nearly zero, which is rounding.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves right --w 64 --h 64 --f 5 --s 2 --d 3\n", "utf-8")
    words = (*TRAINING, "--validation_timesteps", 2, "--sample_prompts", prompts, "--sample_every_n_steps", 2)
    words = (*words, "--text_cache_dir", tmp_path / "text")
    words = (*words, "--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9", "--learning_rate", 1)
    two = launch(tmp_path / "two", batches, *words, "--gradient_checkpointing", launcher=FSDP)
    assert two.code == 0, two.stderr[-3000:]
    one = train(tmp_path / "one", batches, *words, "--gradient_accumulation_steps", 2)
    assert one.code == 0, one.stderr
    assert_split(two, {"torch.float32"})
    assert_numbers_alike(two, one, rtol=1e-5, atol=1e-6)
    found, expected = loras_of(two, one)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
    assert [(record["step"], record["index"]) for record in two.of("sample")] == [(2, 1), (4, 1)]
    assert len(two.files()) == 2
    assert not two.of("warning")
    assert "UserWarning" not in two.stderr
    written = [set((two.folder / f"writes-{rank}.txt").read_text().split("\n")[:-1]) for rank in range(2)]
    theirs = {Path(path).name for path in written[1] if path.startswith(str(tmp_path))}
    assert all(name.startswith((".rng-1", "rng-1", "weights-1")) for name in theirs), theirs

    state = two.folder / "checkpoints/my-000001-state"
    frozen = sum(path.stat().st_size for path in Path(PATHS.dit or "").rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in state.iterdir()) < frozen / 4, "nothing of the model is saved"
    again = launch(tmp_path / "again", batches, *words, "--resume", state, launcher=FSDP)
    assert again.code == 0, again.stderr[-3000:]
    assert [record["step"] for record in again.of("step")] == [4, 5]
    assert same(again.folder / "checkpoints/my.safetensors", two.folder / "checkpoints/my.safetensors")


@pytest.mark.slow
def test_with_fsdp_two_number_formats_and_a_lora_that_one_process_drops(
    batches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 blocks have float32 islands, and come back from their halves bit for bit. A block that has few LoRA
    layers is often left out by one process alone, which must run its backward pass for the other all the same.
    """
    words = (
        *SMALL, "--max_train_steps", 6, "--mixed_precision", "bf16", "--network_args", "module_dropout=0.5",
        "include_patterns=['.*self_attention.to_query']",
    )  # fmt: skip
    two = launch(tmp_path / "two", batches, *words, launcher=FSDP)
    assert two.code == 0, two.stderr[-3000:]
    assert_split(two, {"torch.float32", "torch.bfloat16"})
    plain = train(tmp_path / "plain", batches, *words, "--gradient_accumulation_steps", 2)
    prepare = TrainingTransformer.__init__

    def prepared(transformer: TrainingTransformer, *arguments: Any) -> None:
        prepare(transformer, *arguments)
        transformer.model.run_block = partial(_run_in_step, run_together)

    monkeypatch.setattr(TrainingTransformer, "__init__", prepared)
    one = train(tmp_path / "one", batches, *words, "--gradient_accumulation_steps", 2)
    assert (plain.code, one.code) == (0, 0), plain.stderr + one.stderr
    assert same(*(run.folder / "checkpoints/my.safetensors" for run in (two, one)))
    assert_numbers_alike(two, plain, rtol=1e-3, atol=1e-4)
    found, expected = (flat(lora, "lora_up") for lora in loras_of(two, plain))
    assert float(nn.functional.cosine_similarity(found, expected, dim=0)) > 0.999


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def options() -> TrainOptions:
    return TrainOptions(task="k5-demo-t2v")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_other_ways_to_split_the_model_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not supported"):
        Processes(options(), LAUNCHED | {name: "true"})


def test_fsdp_for_one_process_is_refused() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, without a word (environment.md 6)."""
    with pytest.raises(UserError, match="only one was started"):
        Processes(options(), {"ACCELERATE_USE_FSDP": "true"})


def test_what_contradicts_fsdp_is_refused_before_anything_is_loaded(
    training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true", "FSDP_VERSION": "1"}
    launcher |= {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    for name, value in ({**LAUNCHED, "RANK": "0", "LOCAL_RANK": "0"} | launcher).items():
        monkeypatch.setenv(name, value)
    words = (*SMALL, "--fp8_base", "--fp8_scaled", "--blocks_to_swap", 1, "--offload_dit_during_sampling")
    run = train(tmp_path / "run", training_data, *words)
    assert run.code == 2
    (failed,) = run.of("error")
    fields = [problem["field"] for problem in failed["problems"]]
    assert fields == ["fp8_base", "fp8_scaled", "blocks_to_swap", "offload_dit_during_sampling", None, None, None]
    assert "--fsdp_version 2" in run.stderr
    assert not run.of("phase")


def test_two_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --multi_gpu` on a machine without a GPU starts two independent processes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processes = Processes(options(), LAUNCHED)
    assert (processes.rank, processes.count, processes.first) == (1, 2, False)
    with pytest.raises(UserError, match="they do not work together"), processes:
        pytest.fail("nothing may be trained")


def test_a_launch_that_cannot_connect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LAUNCHED | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    PartialState._reset_state()
    try:
        with pytest.raises(UserError, match="could not be connected"), Processes(options()):
            pytest.fail("nothing may be trained")
    finally:
        PartialState._reset_state()


@pytest.mark.parametrize("values", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one"}, {"WORLD_SIZE": "0"}])
def test_places_that_make_no_sense_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(UserError, match="RANK"):
        Processes(options(), values)
