"""Two processes train as one with twice the accumulation, write no file twice, and refuse launches that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

from backend.config.state_record import read_record
from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.events import read_events
from backend.training.processes import Processes
from tests.conftest import REPOSITORY
from tests.integration.command import Run
from tests.integration.training_runs import SMALL, train, weights, write_config

# Five batches an epoch: the last step of one has a single batch, so that the second process has none.
TRAINING = (
    *SMALL, "--max_train_steps", 5, "--network_args", "module_dropout=0.3", "rank_dropout=0.1",
    "--lr_scheduler", "linear", "--save_every_n_epochs", 1, "--save_state",
)  # fmt: skip


@pytest.fixture
def batches(training_data: Path, tmp_path: Path) -> Path:
    clips = "batch_size = 2\ncaption_dropout = 0.5\nvalidation_split = 0.2\nnum_repeats = 2"
    return write_config(training_data.parent, tmp_path / "batches.toml", clips=clips, stills="batch_size = 2")


def launch(folder: Path, config: Path, *words: object) -> Run:
    """Two processes of the real command on CPUs, through torch's launcher."""
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "tests.fakes.audited_training", "--dataset_config", str(config), "--run_dir", str(folder)),
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


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def options() -> TrainOptions:
    return TrainOptions(task="k5-demo-t2v")


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_launches_are_refused(name: str) -> None:
    """accelerate on CPU would turn FSDP into DDP without a word (environment.md 6)."""
    with pytest.raises(UserError, match="keeps a whole one"):
        Processes(options(), {name: "true"})


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
