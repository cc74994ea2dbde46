"""States: exact resuming (T17), whole or absent, refusals, several processes, leftovers of writers that were killed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.config.state_record import COMPLETE, POSITION, read_record, replaced_folder, saving_folder
from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.events import try_lock
from backend.training.state import Position, latest_state, load_state, save_state
from tests.unit.training.trained import Training, halving, training

OPTIONS = TrainOptions(task="k5-demo-t2v", output_name="clip", max_train_steps=40)


def save(made: Training, folder: Path, step: int, options: TrainOptions = OPTIONS, **changed: Any) -> Path:
    facts: dict[str, Any] = {"seed": 7, "extra": {"base_fingerprint": "ab"}, "rank": 0, "count": 1}
    facts |= {"barrier": lambda: None, **changed}
    position = Position(step, step // 4, step % 4)
    save_state(
        folder, position, lora=made.lora, optimizer=made.optimizer, schedule=made.schedule, options=options, **facts
    )
    return folder


def load(folder: Path, made: Training, options: TrainOptions | None = None) -> tuple[Position, int, dict[str, Any]]:
    return load_state(folder, made.lora, made.optimizer, made.schedule, 0, 1, options)


def named(folder: Path, step: int) -> Path:
    return folder / f"clip-step{step:08d}-state"


def test_ten_steps_and_ten_steps_are_twenty(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = training(make_schedule=halving)
    expected = whole.run(1, 20)

    torch.manual_seed(1)
    first = training(make_schedule=halving)
    assert torch.equal(torch.stack(first.run(1, 10)), torch.stack(expected[:10]))
    random.seed(5)
    folder = save(first, named(tmp_path, 10), 10)
    drawn = random.random()

    torch.manual_seed(2)
    random.seed(6)
    second = training(make_schedule=halving, seed=3)
    assert load(folder, second) == (Position(10, 2, 2), 7, {"base_fingerprint": "ab"})
    assert random.random() == drawn
    assert torch.equal(torch.stack(second.run(11, 20)), torch.stack(expected[10:]))


def test_saving_changes_nothing_that_follows(tmp_path: Path) -> None:
    seen = []
    for saves in (False, True):
        torch.manual_seed(1)
        made = training()
        made.run(1, 3)
        if saves:
            save(made, named(tmp_path, 3), 3)
        seen.append(torch.stack(made.run(4, 6)))
    assert torch.equal(*seen)


def test_the_record_says_what_was_trained_and_how(tmp_path: Path) -> None:
    made = training()
    made.run(1, 1)
    record = read_record(save(made, named(tmp_path, 9), 9))
    assert record.position == Position(9, 2, 1)
    assert (record.seed, record.processes) == (7, 1)
    assert record.options == OPTIONS.model_dump(mode="json")
    assert record.optimizer == "torch.optim.adamw.AdamW"
    assert record.versions["torch"] == torch.__version__
    assert {path.name for path in record.folder.iterdir()} == {
        "COMPLETE.json", "lora.safetensors", "optimizer.json", "optimizer.safetensors", "position.json", "rng-0.json",
        "rng-0.safetensors", "schedule.json",
    }  # fmt: skip


def test_a_state_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    made = training()
    save(made, tmp_path / "clip-state", 5)
    save(made, tmp_path / "clip-state", 6)
    assert read_record(tmp_path / "clip-state", hashes=True).position.step == 6
    assert os.listdir(tmp_path) == ["clip-state"]


def test_what_is_no_state_of_ours_is_kept_under_another_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "clip-state").mkdir()
        (tmp_path / "clip-state" / "optimizer.bin").write_text(f"of somebody {number}")
        save(training(), tmp_path / "clip-state", 5)
        assert (tmp_path / f"clip-state.before-{number}" / "optimizer.bin").read_text() == f"of somebody {number}"
        shutil.rmtree(tmp_path / "clip-state")


# --- refusals -----------------------------------------------------------------------------------------------------


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    folder = save(training(), named(tmp_path, 1), 1)
    with pytest.raises(UserError, match=r"with the optimizer torch\.optim\.adamw\.AdamW, this run has .*SGD"):
        load(folder, training(lambda parameters: torch.optim.SGD(parameters, lr=1e-3)))


def test_an_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    folder = save(training(), named(tmp_path, 1), 1)
    grouped = training(lambda parameters: torch.optim.AdamW([{"params": [p]} for p in parameters], lr=1e-3))
    with pytest.raises(UserError, match="does not fit to this run"):
        load(folder, grouped)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink], ids=["cut", "flipped", "deleted"])
def test_damage_of_any_file_is_noticed_and_the_state_before_is_taken(damage: Any, tmp_path: Path) -> None:
    made = training()
    made.run(1, 2)
    old, new = save(made, named(tmp_path, 1), 1), save(made, named(tmp_path, 2), 2)
    copy = tmp_path / "copy"
    shutil.copytree(new, copy)
    names = [path.name for path in new.iterdir()]
    assert len(names) == 8
    for name in names:
        damage(new / name)
        with pytest.raises(UserError, match=r"is damaged|is not a whole state"):
            load(new, training())
        assert latest_state(tmp_path, "clip") == old
        shutil.rmtree(new)
        shutil.copytree(copy, new)
    assert latest_state(tmp_path, "clip") == new


def test_a_state_of_a_later_format_is_refused(tmp_path: Path) -> None:
    folder = save(training(), named(tmp_path, 1), 1)
    complete = json.loads((folder / COMPLETE).read_text())
    (folder / COMPLETE).write_text(json.dumps({**complete, "format": 2}))
    with pytest.raises(UserError, match="Go on with the version that wrote it"):
        read_record(folder)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "a/b"])
def test_a_list_of_files_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = save(training(), named(tmp_path, 1), 1)
    complete = json.loads((folder / COMPLETE).read_text())
    complete["files"][name] = {"bytes": 1, "sha256": ""}
    (folder / COMPLETE).write_text(json.dumps(complete))
    with pytest.raises(UserError, match="is damaged"):
        read_record(folder)


def test_what_is_no_state_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        read_record(tmp_path / "gone")
    with pytest.raises(UserError, match=f"it has no {COMPLETE}"):
        read_record(tmp_path)


# --- which one is the latest --------------------------------------------------------------------------------------


def test_the_latest_is_the_one_with_the_most_steps_not_the_youngest(tmp_path: Path) -> None:
    made = training()
    save(made, named(tmp_path, 100), 100)
    save(made, tmp_path / "clip-000002-state", 90)
    save(made, named(tmp_path, 20), 20)
    assert latest_state(tmp_path, "clip") == named(tmp_path, 100)
    assert latest_state(tmp_path / "gone", "clip") is None
    assert latest_state(tmp_path, "other") is None


def test_names_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    made = training()
    save(made, tmp_path / "clip-state", 1)
    save(made, tmp_path / "clip-big-state", 50, OPTIONS.model_copy(update={"output_name": "clip-big"}))
    # The end of a run that is called clip-000005, not epoch 5 of clip.
    save(made, tmp_path / "clip-000005-state", 60, OPTIONS.model_copy(update={"output_name": "clip-000005"}))
    assert latest_state(tmp_path, "clip") == tmp_path / "clip-state"
    assert latest_state(tmp_path, "clip-000005") == tmp_path / "clip-000005-state"


# --- changed options take effect ----------------------------------------------------------------------------------


def _options(**changed: Any) -> TrainOptions:
    return TrainOptions(**{**OPTIONS.model_dump(), **changed})


def test_a_new_learning_rate_is_used_and_the_old_one_is_not(tmp_path: Path) -> None:
    first = training(make_schedule=halving)
    first.run(1, 6)
    folder = save(first, named(tmp_path, 6), 6)
    second = training(lambda parameters: torch.optim.AdamW(parameters, lr=2e-3), halving)
    load(folder, second, _options(learning_rate=2e-3))
    third = training(make_schedule=halving)
    load(folder, third, OPTIONS)
    rates = [made.optimizer.param_groups[0]["lr"] for made in (first, second, third)]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert rates[2] == rates[0]
    for made in (first, second, third):
        made.step(7)
    rates = [made.optimizer.param_groups[0]["lr"] for made in (first, second, third)]
    assert rates[1] == pytest.approx(2 * rates[0])


def test_a_changed_argument_of_the_optimizer_is_used_and_its_memory_is_kept(tmp_path: Path) -> None:
    first = training()
    first.run(1, 3)
    folder = save(first, named(tmp_path, 3), 3, _options(optimizer_args=["weight_decay=0.01", "eps=1e-6"]))
    second = training(lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.5, eps=1e-3))
    load(folder, second, _options(optimizer_args=["weight_decay=0.5", "eps=1e-6"]))
    group = second.optimizer.param_groups[0]
    assert group["weight_decay"] == 0.5
    assert group["eps"] == first.optimizer.param_groups[0]["eps"]
    parameter = second.lora.downs[0]
    assert torch.equal(
        second.optimizer.state[parameter]["exp_avg"], first.optimizer.state[first.lora.downs[0]]["exp_avg"]
    )


def test_an_optimizer_whose_tensors_have_another_format_keeps_it(tmp_path: Path) -> None:
    """torch's own load_state_dict turns every float into the format of the parameter."""
    first = training()
    first.run(1, 2)
    for state in first.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)
        state["extra"] = torch.tensor(1 / 3, dtype=torch.float64)
    folder = save(first, named(tmp_path, 2), 2)
    second = training()
    load(folder, second)
    for left, right in zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        for name, value in left.items():
            assert right[name].dtype == value.dtype
            assert torch.equal(right[name], value)


# --- trouble while writing ----------------------------------------------------------------------------------------


def test_a_full_disk_is_a_sentence_and_leaves_the_old_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = training()
    old = save(made, named(tmp_path, 1), 1)
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space is left") as caught:
        save(made, named(tmp_path, 2), 2)
    assert str(tmp_path) in str(caught.value)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [old.name]
    assert latest_state(tmp_path, "clip") == old


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="are needed"):
        save(training(), named(tmp_path, 2), 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_without_rights_is_a_sentence(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *_: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match="Choose a folder that you may write to"):
        save(training(), named(tmp_path, 2), 2)


def test_an_optimizer_that_keeps_code_ends_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    made = training()
    made.run(1, 1)
    made.optimizer.state[made.lora.downs[0]]["hook"] = print
    with pytest.raises(UserError, match="keeps builtins"):
        save(made, named(tmp_path, 1), 1)
    assert os.listdir(tmp_path) == []


def _leftover(final: Path, age: float, locked: bool | None) -> int | None:
    """A folder of a writer that lives (locked), was killed (free lock) or had no lock (None)."""
    folder = saving_folder(final)
    folder.mkdir()
    (folder / "lora.safetensors").write_text("half")
    descriptor = None
    if locked is not None:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        if locked:
            assert try_lock(descriptor)
        else:
            os.close(descriptor)
            descriptor = None
    moment = folder.stat().st_mtime - age
    os.utime(folder, (moment, moment))
    return descriptor


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    _leftover(named(tmp_path, 1), 0, locked=False)
    _leftover(named(tmp_path, 2), 3600, locked=None)
    _leftover(named(tmp_path, 3), 0, locked=None)  # may be about to lock it
    alive = _leftover(named(tmp_path, 4), 3600, locked=True)
    _leftover(named(tmp_path, 5), 0, locked=None)  # our own name: whoever it was is dead
    (tmp_path / ".mine.saving").write_text("a file of somebody else")
    save(training(), named(tmp_path, 5), 5)
    assert alive is not None
    os.close(alive)
    left = {saving_folder(named(tmp_path, number)).name for number in (3, 4)}
    assert set(os.listdir(tmp_path)) == {*left, ".mine.saving", named(tmp_path, 5).name}


def test_two_runs_that_save_to_one_name_are_told_so(tmp_path: Path) -> None:
    alive = _leftover(named(tmp_path, 5), 3600, locked=True)
    with pytest.raises(UserError, match="Another process is saving"):
        save(training(), named(tmp_path, 5), 5)
    assert (saving_folder(named(tmp_path, 5)) / "lora.safetensors").read_text() == "half"
    assert alive is not None
    os.close(alive)


def test_a_state_that_was_set_aside_when_its_writer_was_killed_is_found_and_put_back(tmp_path: Path) -> None:
    made = training()
    final = save(made, tmp_path / "clip-state", 5)
    final.rename(replaced_folder(final))
    found = latest_state(tmp_path, "clip")
    assert found == replaced_folder(final)
    assert load(found, training())[0].step == 5
    save(made, named(tmp_path, 1), 1)
    assert latest_state(tmp_path, "clip") == found
    save(made, final, 6)
    assert latest_state(tmp_path, "clip") == final
    assert not replaced_folder(final).exists()


# --- several processes --------------------------------------------------------------------------------------------


class _Threads:
    """Processes of a launch, played by threads that share a barrier."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)

    def save(self, folder: Path) -> None:
        made = training()

        def one(rank: int) -> None:
            save(made, folder, 4, rank=rank, count=self.count, barrier=lambda: self.barrier.wait(30) and None)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_every_process_saves_its_generators_and_the_first_one_the_rest(tmp_path: Path) -> None:
    folder = named(tmp_path, 4)
    _Threads(3).save(folder)
    assert read_record(folder, hashes=True).processes == 3
    assert sorted(path.name for path in folder.glob("rng-*.json")) == ["rng-0.json", "rng-1.json", "rng-2.json"]
    made = training()
    for rank in (2, 3):
        torch.manual_seed(1234)
        before = torch.get_rng_state()
        load_state(folder, made.lora, made.optimizer, made.schedule, rank, 4)
        # The saved run had no fourth process, so that keeps what it has.
        assert torch.equal(torch.get_rng_state(), before) is (rank == 3)


def test_a_process_that_writes_elsewhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rng-1\.json did not arrive"):
        save(training(), named(tmp_path, 4), 4, count=2)
    assert os.listdir(tmp_path) == []


def test_no_pickle_and_no_file_that_is_not_listed(tmp_path: Path) -> None:
    folder = save(training(), named(tmp_path, 1), 1)
    listed = set(json.loads((folder / COMPLETE).read_text())["files"])
    assert {path.name for path in folder.iterdir()} == {*listed, COMPLETE}
    assert POSITION in listed
    assert all(path.suffix in (".json", ".safetensors") for path in folder.iterdir())
