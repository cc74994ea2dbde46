"""Files of a run: names, number formats, records, and which of them are deleted."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.lora.formats import LoraWeights, read_lora
from backend.progress import Reporter
from backend.training.checkpoints import Checkpoints, Saved
from backend.training.state import Position, latest_state, save_state
from tests.unit.training.test_requests import Records
from tests.unit.training.trained import LAYERS, SmallLora, Training, training


class Run:
    """A run that saves: 10 steps an epoch, one batch a step."""

    def __init__(self, folder: Path, rank: int = 0, **options: Any) -> None:
        self.journal = Records()
        self.folder = folder
        self.options = TrainOptions(output_name="clip", **options)
        self.metadata: list[Mapping[str, LoraWeights]] = []
        reporter = Reporter(self.journal, folder, io.StringIO())
        self.checkpoints = Checkpoints(self.options, folder, reporter, self._metadata, rank)
        self.training: Training = training()

    def _metadata(self, position: Position, layers: Mapping[str, LoraWeights]) -> dict[str, str]:
        self.metadata.append(layers)
        return {"ss_steps": str(position.step)}

    def save(self, step: int, why: Any, state: bool = False) -> Saved:
        position = Position(step, step // 10, step % 10)

        def saver(folder: Path) -> None:
            made = self.training
            save_state(
                folder, position, 1, made.lora, made.optimizer, made.schedule, self.options, {}, 0, 1, lambda: None
            )

        return self.checkpoints.save(position, why, self.training.lora, saver if state else None)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.checkpoints.folder))

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.journal.records if name == kind]


def stems(run: Run, suffix: str = ".safetensors") -> list[str]:
    return [name.removesuffix(suffix).removeprefix("clip") for name in run.names() if name.endswith(suffix)]


# --- names, contents, records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "why", "stem"),
    [
        (50, "epoch", "clip-000005"),
        (55, "epoch", "clip-000006"),  # an epoch whose last step is not normalised to the next epoch's start
        (1000, "step", "clip-step00001000"),
        (17, "request", "clip-step00000017"),
        (18, "stop", "clip-step00000018"),
        (100, "end", "clip"),
    ],
)
def test_names_are_those_that_users_know(step: int, why: Any, stem: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved = run.save(step, why, state=True)
    assert saved.lora == tmp_path / "checkpoints" / f"{stem}.safetensors"
    assert saved.state == tmp_path / "checkpoints" / f"{stem}-state"
    assert run.names() == sorted([f"{stem}.safetensors", f"{stem}-state"])
    assert latest_state(tmp_path / "checkpoints", "clip") == saved.state


def test_records_say_what_is_on_the_disk(tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved = run.save(25, "step", state=True)
    assert saved.lora is not None
    lora, state = run.records("checkpoint")
    assert (lora["kind"], lora["why"], lora["step"], lora["epoch"]) == ("lora", "step", 25, 3)
    assert lora["path"] == "checkpoints/clip-step00000025.safetensors"
    assert lora["bytes"] == saved.lora.stat().st_size
    assert lora["sha256"] == hashlib.sha256(saved.lora.read_bytes()).hexdigest()
    assert (state["kind"], state["path"]) == ("state", "checkpoints/clip-step00000025-state")
    assert state["bytes"] > lora["bytes"] / 2


def test_a_folder_outside_of_the_run_is_named_in_full(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", output_dir=str(tmp_path / "files"))
    run.save(1, "end")
    assert run.records("checkpoint")[0]["path"] == (tmp_path / "files" / "clip.safetensors").as_posix()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float", torch.float32), ("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_the_file_has_the_number_format_that_was_asked_for(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    run = Run(tmp_path, save_precision=precision)
    path = run.save(3, "end").lora
    assert path is not None
    tensors = load_file(path)
    expected = run.training.lora.weights()[LAYERS[0]].down.to(dtype)
    stem = "lora_unet_" + LAYERS[0].replace(".", "_")
    assert torch.equal(tensors[f"{stem}.lora_down.weight"], expected)
    assert tensors[f"{stem}.lora_down.weight"].dtype == dtype
    assert tensors[f"{stem}.alpha"].dtype == torch.float32
    assert read_lora(path).metadata["ss_steps"] == "3"
    # Hashes in the metadata are of what the file holds.
    assert torch.equal(run.metadata[0][LAYERS[0]].down, expected)


def test_which_saves_have_a_state(tmp_path: Path) -> None:
    def wanted(**options: Any) -> list[str]:
        checkpoints = Run(tmp_path, **options).checkpoints
        return [why for why in ("epoch", "step", "end", "request", "stop") if checkpoints.wants_state(why)]  # type: ignore[arg-type]

    assert wanted() == ["request", "stop"]
    assert wanted(save_state=True) == ["epoch", "step", "end", "request", "stop"]
    assert wanted(save_state_on_train_end=True) == ["end", "request", "stop"]


def test_other_processes_write_no_file_but_take_part_in_the_state(tmp_path: Path) -> None:
    run = Run(tmp_path, rank=1)
    called: list[Path] = []
    saved = run.checkpoints.save(Position(5, 0, 5), "step", run.training.lora, called.append)
    assert called == [tmp_path / "checkpoints" / "clip-step00000005-state"]
    assert saved == Saved(None, called[0])
    assert not (tmp_path / "checkpoints").exists()
    assert run.journal.records == []


def test_without_any_folder_it_says_which_option_is_missing() -> None:
    with pytest.raises(UserError, match="Say where") as caught:
        Checkpoints(TrainOptions(), None, Reporter(Records()), lambda *_: {})
    assert caught.value.field == "output_dir"


# --- what is kept -------------------------------------------------------------------------------------------------


def test_the_last_n_of_epochs_are_a_count(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_epochs=2, save_last_n_epochs=3)
    for epoch in range(2, 22, 2):
        run.save(epoch * 10, "epoch", state=True)
    assert stems(run) == ["-000016", "-000018", "-000020"]
    assert stems(run, "-state") == ["-000016", "-000018", "-000020"]


def test_the_last_n_of_steps_are_a_distance(tmp_path: Path) -> None:
    """As in musubi: 500 steps and a file every 200 leave those at most 500 steps back."""
    run = Run(tmp_path, save_every_n_steps=200, save_last_n_steps=500)
    for step in range(200, 2200, 200):
        run.save(step, "step", state=True)
    assert stems(run) == ["-step00001600", "-step00001800", "-step00002000"]
    assert stems(run, "-state") == stems(run)


def test_states_have_limits_of_their_own(tmp_path: Path) -> None:
    run = Run(
        tmp_path, save_every_n_steps=10, save_last_n_steps=30, save_last_n_steps_state=10, save_every_n_epochs=1,
        save_last_n_epochs_state=1,
    )  # fmt: skip
    for step in range(10, 70, 10):
        run.save(step, "step", state=True)
        run.save(step, "epoch", state=True)
    assert stems(run) == [f"-{epoch:06d}" for epoch in range(1, 7)] + [f"-step{step:08d}" for step in (30, 40, 50, 60)]
    assert stems(run, "-state") == ["-000006", "-step00000050", "-step00000060"]


def test_a_file_that_was_asked_for_between_the_steps_of_the_series_stays(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    run.save(10, "step")
    run.save(13, "request", state=True)
    for step in (20, 30, 40):
        run.save(step, "step", state=True)
    assert stems(run) == ["-step00000013", "-step00000030", "-step00000040"]
    assert stems(run, "-state") == ["-step00000013", "-step00000030", "-step00000040"]


def test_without_a_new_state_the_old_ones_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    run.save(10, "step", state=True)
    for step in (20, 30, 40):
        run.save(step, "step")
    assert stems(run, "-state") == ["-step00000010"]
    assert stems(run) == ["-step00000030", "-step00000040"]


def _foreign(folder: Path) -> list[str]:
    """Things with names that are nearly ours."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        "clip-000001.ckpt", "clip-big-000001.safetensors", "clip-01.safetensors", "other-000001.safetensors",
        "clip-step10.safetensors", "clip-000001.safetensors.bak", "clipX-step00000001.safetensors",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_text("x")
    (folder / "clip-000001-state").mkdir()  # without COMPLETE.json: of another program
    (folder / "clip-000001-state" / "optimizer.bin").write_text("x")
    (folder / "clip-000002.safetensors").mkdir()
    return [*names, "clip-000001-state", "clip-000002.safetensors"]


@pytest.mark.parametrize("resume", [None, "latest"])
def test_nothing_of_another_name_or_kind_is_ever_deleted(resume: str | None, tmp_path: Path) -> None:
    kept = _foreign(tmp_path / "checkpoints")
    run = Run(
        tmp_path, resume=resume, save_every_n_steps=10, save_last_n_steps=10, save_every_n_epochs=3,
        save_last_n_epochs=1,
    )  # fmt: skip
    for step in range(30, 90, 10):
        run.save(step, "step", state=True)
        if step % 30 == 0:
            run.save(step, "epoch", state=True)
    assert set(kept) <= set(run.names())
    assert stems(run, "-state") == ["-000001", "-000006", "-step00000070", "-step00000080"]


def test_files_of_an_earlier_run_are_deleted_only_by_one_that_goes_on_from_it(tmp_path: Path) -> None:
    first = Run(tmp_path, save_every_n_steps=10)
    for step in (10, 20, 30):
        first.save(step, "step", state=True)
    fresh = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    fresh.save(60, "step", state=True)
    assert stems(fresh) == ["-step00000010", "-step00000020", "-step00000030", "-step00000060"]
    resumed = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10, resume="latest")
    resumed.save(70, "step", state=True)
    assert stems(resumed) == ["-step00000060", "-step00000070"]


def test_one_that_goes_on_from_an_earlier_point_deletes_nothing_later(tmp_path: Path) -> None:
    first = Run(tmp_path, save_every_n_steps=10, save_every_n_epochs=1)
    for step in (10, 20, 30, 40):
        first.save(step, "step", state=True)
        first.save(step, "epoch", state=True)
    back = Run(
        tmp_path, resume="x", save_every_n_steps=10, save_last_n_steps=5, save_every_n_epochs=1, save_last_n_epochs=1
    )
    back.save(20, "step", state=True)
    back.save(20, "epoch", state=True)
    expected = ["-000002", "-000003", "-000004", "-step00000020", "-step00000030", "-step00000040"]
    assert stems(back) == expected
    assert stems(back, "-state") == expected


def test_a_file_that_cannot_be_deleted_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    run.save(10, "step")
    run.save(20, "step")
    original: Callable[..., None] = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "clip-step00000010.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        original(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    run.save(30, "step")
    assert "could not be deleted: Permission denied" in run.records("warning")[0]["message"]
    assert stems(run) == ["-step00000010", "-step00000020", "-step00000030"]


def test_what_killed_writers_left_behind_goes_and_what_others_are_writing_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    old, young, other = (
        folder / name
        for name in (
            ".clip-step00000010.0a1b2c3d.tmp.safetensors", ".clip-step00000020.0a1b2c3d.tmp.safetensors",
            ".other.0a1b2c3d.tmp.safetensors",
        )
    )  # fmt: skip
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    Run(tmp_path).save(30, "step")
    assert sorted(path.name for path in folder.glob(".*")) == sorted([young.name, other.name])


# --- trouble ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_sentence_and_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    run.save(10, "step")
    run.save(20, "step")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="are needed"):
        run.save(40, "step")
    assert stems(run) == ["-step00000010", "-step00000020"]
    assert len(run.records("checkpoint")) == 2


def test_a_failing_state_keeps_the_lora_and_the_older_states(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every_n_steps=10, save_last_n_steps=10)
    run.save(10, "step", state=True)

    def fail(_: Path) -> None:
        raise UserError("No space is left.")

    with pytest.raises(UserError):
        run.checkpoints.save(Position(40, 4, 0), "step", SmallLora(), fail)
    assert stems(run) == ["-step00000010", "-step00000040"]
    assert stems(run, "-state") == ["-step00000010"]


def test_what_a_new_run_would_overwrite_is_said_once_at_its_start(tmp_path: Path) -> None:
    assert Run(tmp_path).records("warning") == []
    Run(tmp_path).save(10, "epoch")
    (warning,) = Run(tmp_path).records("warning")
    assert "holds files of an earlier run" in warning["message"]
    Run(tmp_path).save(10, "end")
    (warning,) = Run(tmp_path).records("warning")
    assert "clip.safetensors is there already and will be overwritten" in warning["message"]
    assert warning["field"] == "output_name"
    assert Run(tmp_path, resume="latest").records("warning") == []
    assert Run(tmp_path, rank=1).records("warning") == []
