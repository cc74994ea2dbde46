"""Training that is killed without warning, again and again, ends with the very numbers of one that was not."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from backend.config.state_record import latest_state, read_record
from backend.events import read_events
from tests.integration.training_runs import SMALL, cache, make_sources, same, write_config
from tests.reliability.training_server import TrainingServer

pytestmark = [pytest.mark.torture, pytest.mark.timeout(3600)]

STEPS = 14
# All that is random, an epoch whose last step is short, and a state after every second step.
WORDS = (
    *SMALL, "--max_train_steps", str(STEPS), "--gradient_accumulation_steps", "2", "--network_dropout", "0.2",
    "--network_args", "rank_dropout=0.2", "module_dropout=0.1", "--lr_scheduler", "cosine", "--lr_warmup_steps", "4",
    "--save_every_n_steps", "2", "--save_state", "--save_last_n_steps", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real clips and stills, batches of two, repeats, captions that are dropped."""
    folder = tmp_path_factory.mktemp("data")
    cache(make_sources(folder))
    clips = "batch_size = 2\nnum_repeats = 2\ncaption_dropout = 0.5"
    return write_config(folder, folder / "batches.toml", clips=clips, stills="batch_size = 2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    with TrainingServer(tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server


class Trained:
    """One training in a folder, over all its attempts."""

    def __init__(self, server: TrainingServer, config: Path, folder: Path) -> None:
        self.files = folder / "files"
        self.attempts = 0
        self._server, self._config, self._folder = server, config, folder

    def attempt(self, kill_when: Callable[[], bool] | None = None, number: int = signal.SIGKILL) -> int:
        """One start, from the latest whole state if there is one; the exit code."""
        self.attempts += 1
        before = latest_state(self.files, "my")
        resume = ["--resume", "latest"] if before is not None else []
        first = read_record(before).position.step + 1 if before is not None else 1  # that state may be deleted then
        words = ["--dataset_config", str(self._config), "--output_dir", str(self.files), "--run_dir", str(self._run)]
        code = self._server.run(*WORDS, *words, *resume, kill_when=kill_when, number=number)
        steps = self.steps()
        if steps:
            assert steps == list(range(first, first + len(steps))), "not one step twice, not one left out"
        return code

    @property
    def _run(self) -> Path:
        return self._folder / f"run{self.attempts}"

    def steps(self) -> list[int]:
        """Steps of this attempt."""
        journal = self._run / "events.jsonl"
        if not journal.exists():
            return []
        return [int(record["step"]) for record in read_events(journal).records if record["type"] == "step"]

    def check_files(self) -> None:
        """Whatever has a final name is whole."""
        for path in self.files.glob("[!.]*-state"):
            read_record(path, hashes=True)
        for path in self.files.glob("[!.]*.safetensors"):
            assert same(path, path)

    @property
    def done(self) -> bool:
        latest = latest_state(self.files, "my")
        return latest is not None and read_record(latest).position.step == STEPS

    def same_as(self, other: Trained) -> bool:
        """LoRA and optimizer bit for bit."""
        tensors = [each.files / "my-state" / "optimizer.safetensors" for each in (self, other)]
        return (
            same(self.files / "my.safetensors", other.files / "my.safetensors")
            and tensors[0].read_bytes() == tensors[1].read_bytes()
        )


def _size(folder: Path) -> int:
    with suppress(FileNotFoundError):  # it has just got its final name
        return len(os.listdir(folder))
    return 0


def _moment(chance: random.Random, training: Trained, kind: str) -> Callable[[], bool]:
    """When to kill: while it loads, during some step, or in the middle of some save (too short to be met by chance)."""
    began, delay = time.monotonic(), chance.random() * 0.15
    if kind == "loading":
        wanted_seconds = chance.random() * 2
        return lambda: time.monotonic() - began > wanted_seconds
    wanted = chance.randrange(1, STEPS // 2)
    arrived: list[float] = []
    known = {path.name for path in training.files.glob("*-state")}

    def saved() -> int:
        return sum(path.name not in known for path in training.files.glob("[!.]*-state"))

    def in_a_step() -> bool:
        if not arrived and saved() >= wanted - 1 and training.steps():
            arrived.append(time.monotonic())
        return bool(arrived) and time.monotonic() - arrived[0] > delay

    def in_a_save() -> bool:
        if saved() < wanted - 1:
            return False
        return any(_size(building) >= wanted for building in training.files.glob(".*.saving"))

    return in_a_save if kind == "saving" else in_a_step


def _killed(
    server: TrainingServer, config: Path, folder: Path, undisturbed: Trained, kills: int, chance: random.Random
) -> Counter[str]:
    """Trainings with up to three kills each, until there were so many; what was met."""
    met: Counter[str] = Counter()
    kinds = itertools.cycle(["step", "saving", "loading", "step", "saving"])
    while met["killed"] < kills:
        training = Trained(server, config, folder / f"training{met['trainings']}")
        met["trainings"] += 1
        for _ in range(chance.randrange(1, 4)):
            kind = next(kinds)
            code = training.attempt(_moment(chance, training, kind))
            training.check_files()
            assert code in (0, -signal.SIGKILL)
            if training.done:
                break
            assert code == -signal.SIGKILL
            met["killed"] += 1
            met[f"killed while {kind}"] += 1
            met["half-written states left behind"] += sum(1 for _ in training.files.glob(".*.saving"))
        if not training.done:
            assert training.attempt() == 0
        training.check_files()
        assert training.same_as(undisturbed), f"training {met['trainings']}, {training.attempts} attempts"
        assert not list(training.files.glob(".*.saving")), "the next save has cleaned up"
    return met


@pytest.fixture(scope="module")
def undisturbed(server: TrainingServer, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    training = Trained(server, config, tmp_path_factory.mktemp("undisturbed"))
    assert training.attempt() == 0
    assert training.done
    return training


def test_fifty_kills_change_not_a_bit(
    server: TrainingServer, config: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    began = time.monotonic()
    met = _killed(server, config, tmp_path, undisturbed, 50, random.Random(11))
    print(f"\n50 interruptions with kill -9 in {time.monotonic() - began:.0f} s: {dict(met)}")
    assert met["killed while saving"] > 5
    assert met["killed while step"] > 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_nothing_is_lost(
    number: int, server: TrainingServer, config: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    """Also a step that no periodic state would have had."""
    training = Trained(server, config, tmp_path)
    assert training.attempt(lambda: len(training.steps()) >= 3, number) == 0
    steps = training.steps()
    latest = latest_state(training.files, "my")
    assert latest is not None
    assert read_record(latest).position.step == steps[-1] < STEPS
    assert training.attempt() == 0
    assert training.steps()[0] == steps[-1] + 1
    assert training.same_as(undisturbed)
