"""States of training: everything that the next step depends on, written whole or not at all, and read back.

A state folder is built under a hidden name beside its final one, every file is flushed to the disk, COMPLETE.json
(names, sizes, SHA-256) is written last, and then the folder gets its name. So a folder under a final name is always
whole, whenever the process, or the machine, dies.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from backend.config.state_record import (
    COMPLETE,
    FIELD,
    FORMAT,
    POSITION,
    Position,
    StateRecord,
    latest_state,
    read_record,
    replaced_folder,
    saving_folder,
    sha256_of,
)
from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values
from backend.config.version import VERSION
from backend.errors import UserError
from backend.events import try_lock
from backend.files import fsync_folder, require_free_space, write_atomic, write_problem
from backend.lora.formats import KOHYA_PREFIX, LoraWeights, read_lora, write_lora
from backend.training.state_tensors import read_tree, write_tree

__all__ = ["Position", "StateRecord", "Trained", "latest_state", "load_state", "read_record", "save_state"]

_LORA = "lora.safetensors"
_LOCK = ".lock"
#: A hidden folder without a lock may be one whose writer is just about to lock it.
_LOCK_GRACE_SECONDS = 60.0
_SPACE_FOR_REST = 4 << 20
#: Options by which the learning rate of a step follows; when one of them changes, the schedule is run anew.
_SCHEDULE_OPTIONS = (
    "learning_rate", "max_train_steps", "max_train_epochs", "lr_scheduler", "lr_warmup_steps", "lr_decay_steps",
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
    "lr_scheduler_type", "lr_scheduler_args",
)  # fmt: skip


class Trained(Protocol):
    """What is trained: its layers by their dotted path in the model, as they are now, and set again."""

    def weights(self) -> dict[str, LoraWeights]:
        """Copies on the CPU."""
        ...

    def load(self, layers: Mapping[str, LoraWeights]) -> Any:
        """Set all layers in place; raises UserError when they do not fit."""
        ...


class Schedule(Protocol):
    """A learning rate schedule: torch's, or one of ours."""

    def step(self) -> Any:
        """One optimizer step is done."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that is not the optimizer's."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""
        ...


# --- saving -------------------------------------------------------------------------------------------------------


def save_state(
    folder: str | Path,
    position: Position,
    seed: int,
    lora: Trained,
    optimizer: Optimizer,
    schedule: Schedule,
    options: TrainOptions,
    extra: Mapping[str, Any],
    rank: int,
    count: int,
    barrier: Callable[[], None],
) -> None:
    """Write a state to `folder`; every one of `count` processes calls this at the same step.

    Each process writes its random numbers' state, the first one the rest. A whole state of that name is replaced;
    anything else that has the name is kept beside it as `<name>.before-1` and so on. Leftovers of writers that were
    killed are removed. With a schedule-free optimizer, call this while it is in training mode.

    Args:
        extra: what JSON can hold; `dataset_fingerprint` and `base_fingerprint` are compared on resuming.
        barrier: returns when all processes have called it; called three times.

    Raises:
        UserError: no space, no rights, another process saves to the same name, or the optimizer keeps something that
            cannot be stored. What was there before is untouched then, and nothing half is left. Of several processes,
            the others still wait in `barrier` then, until the launcher ends them.
    """
    folder = Path(folder)
    building = saving_folder(folder)
    with _writing(folder, rank):
        layers = lora.weights() if rank == 0 else {}
        if rank == 0:
            require_free_space(folder.parent, _bytes_needed(layers, optimizer), "output_dir")
            lock = _begin(folder)
        else:
            lock = None
        try:
            barrier()
            write_tree(building, f"rng-{rank}", _random_state(), "The random generators")
            if rank == 0:
                write_lora(building / _LORA, layers, dtype=torch.float32)
                write_tree(building, "optimizer", optimizer.state_dict(), f"The optimizer {_name(optimizer)}")
                write_tree(building, "schedule", schedule.state_dict(), f"The schedule {_name(schedule)}")
                record = _position_record(position, seed, optimizer, schedule, options, extra, count)
                write_atomic(building / POSITION, json.dumps(record, indent=1) + "\n")
            barrier()
            if lock is not None:
                _complete(building, count)
                _publish(building, folder)
            barrier()
        finally:
            if lock is not None:
                os.close(lock)


@contextmanager
def _writing(folder: Path, rank: int) -> Iterator[None]:
    """Turn errors of the disk into sentences, and leave nothing half behind."""
    try:
        yield
    except BaseException as error:
        # Our own lock is closed by now; one that is held belongs to another process, and so does the folder.
        if rank == 0 and not _is_locked(saving_folder(folder)):
            shutil.rmtree(saving_folder(folder), ignore_errors=True)
        if isinstance(error, OSError):
            problem = write_problem(error, folder, "output_dir")
            if problem is not error:
                raise problem from error
        raise


def _bytes_needed(layers: Mapping[str, LoraWeights], optimizer: Optimizer) -> int:
    """An upper bound: the same numbers in float32, the optimizer's tensors, and room for names and numbers."""
    weights = sum(4 * (pair.down.numel() + pair.up.numel()) for pair in layers.values())
    kept = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return weights + kept + _SPACE_FOR_REST


def _begin(folder: Path) -> int:
    """Clear leftovers, make the folder in which `folder` is built, and return the lock that shows that we live."""
    building = saving_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(folder.parent):
        path = folder.parent / name
        if name.startswith(".") and name.endswith(".saving") and not _is_alive(path, path == building):
            shutil.rmtree(path, ignore_errors=path != building)
    if building.exists():
        raise UserError(
            f"Another process is saving {folder} right now. Give this run another --output_name or --output_dir.",
            "output_name",
        )
    replaced = replaced_folder(folder)
    if replaced.exists():
        # A writer was killed between two renames, or after them.
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, folder)
    building.mkdir()
    # The lock is visible under its name only once it is held: who finds it free knows that its writer is dead.
    hidden = building / f"{_LOCK}.new"
    descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try_lock(descriptor)
        os.rename(hidden, building / _LOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_alive(building: Path, ours: bool) -> bool:
    """Whether somebody is still writing there; a folder under our own name without a lock is a leftover."""
    if _is_locked(building):
        return True
    try:
        young = abs(time.time() - building.stat().st_mtime) < _LOCK_GRACE_SECONDS
        return young and not ours and not (building / _LOCK).exists()
    except OSError:
        return True  # Gone a moment ago, or not ours to judge.


def _is_locked(building: Path) -> bool:
    try:
        descriptor = os.open(building / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def _complete(building: Path, count: int) -> None:
    """Write COMPLETE.json: from then on the folder is a state."""
    files = sorted(path for path in building.iterdir() if not path.name.startswith("."))
    missing = {f"rng-{rank}.json" for rank in range(count)} - {path.name for path in files}
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing))} did not arrive in {building.parent}. All processes must write to the same "
            "folder: choose an --output_dir that all machines share.",
            "output_dir",
        )
    facts = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    write_atomic(building / COMPLETE, json.dumps({"format": FORMAT, "files": facts}, indent=1) + "\n")


def _publish(building: Path, folder: Path) -> None:
    """Give the finished folder its name. The old one waits under a name by which `latest_state` finds it."""
    (building / _LOCK).unlink()  # after COMPLETE.json: its list of names is on the disk already
    replaced = replaced_folder(folder)
    if (folder / COMPLETE).is_file():
        os.rename(folder, replaced)
    elif os.path.lexists(folder):
        number = 1
        while os.path.lexists(folder.with_name(f"{folder.name}.before-{number}")):
            number += 1
        os.rename(folder, folder.with_name(f"{folder.name}.before-{number}"))
    os.rename(building, folder)
    fsync_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _position_record(
    position: Position,
    seed: int,
    optimizer: Optimizer,
    schedule: Schedule,
    options: TrainOptions,
    extra: Mapping[str, Any],
    count: int,
) -> dict[str, Any]:
    return {
        "position": {"step": position.step, "epoch": position.epoch, "batch": position.batch},
        "seed": seed,
        "processes": count,
        "optimizer": _name(optimizer),
        "schedule": _name(schedule),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "k5": VERSION},
        "options": options.model_dump(mode="json"),
        "extra": dict(extra),
    }


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


# --- random generators --------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """State of Python's generator, of torch's on the CPU, and of this process's accelerator if it has one."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


# --- loading ------------------------------------------------------------------------------------------------------


def load_state(
    folder: str | Path,
    lora: Trained,
    optimizer: Optimizer,
    schedule: Schedule,
    rank: int,
    count: int,
    options: TrainOptions | None = None,
) -> tuple[Position, int, dict[str, Any]]:
    """Set LoRA, optimizer, schedule and this process's random generators to a state; returns position, seed, extra.

    The content of every file is checked first. With `options`, those of the run that goes on, what they change takes
    effect: arguments of the optimizer are the new ones, and with a changed learning rate, length or schedule the
    schedule is run anew up to this step. Without, everything is as it was saved. A process that the saved run did not
    have keeps its generators: nothing that training draws comes from them.

    Raises:
        UserError: the state is not whole, or belongs to another LoRA or optimizer.
    """
    folder = Path(folder)
    record = read_record(folder, hashes=True)
    if record.optimizer != _name(optimizer):
        raise UserError(
            f"{folder} was made with the optimizer {record.optimizer}, this run has {_name(optimizer)}. "
            "Use the same one, or start a new run with --network_weights.",
            FIELD,
        )
    lora.load(_layers(folder / _LORA, lora.weights()))
    made = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    _load_optimizer(folder, optimizer)
    changed = _changed(record.options, options)
    for group, fresh in zip(optimizer.param_groups, made, strict=True):
        group.update({name: fresh[name] for name in _changed_arguments(record.options, options) if name in fresh})
    if changed or record.schedule != _name(schedule):
        _run_anew(optimizer, schedule, made, record.position.step)
    else:
        _load_schedule(folder, schedule)
    if rank < record.processes:
        _set_random_state(read_tree(folder, f"rng-{rank}"))
    return record.position, record.seed, record.extra


def _layers(path: Path, current: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    """The layers of a state by their paths in the model; unknown names stay as they are, for `load` to refuse.

    The file has alpha in float32; when that is today's alpha, rounded, today's is used, so that no effect changes.
    """
    names = {KOHYA_PREFIX + name.replace(".", "_"): name for name in current}
    layers: dict[str, LoraWeights] = {}
    for stem, pair in read_lora(path).layers.items():
        name = names.get(stem, stem)
        exact = current[name].alpha if name in current else pair.alpha
        same = torch.tensor(exact, dtype=torch.float32).item() == pair.alpha
        layers[name] = LoraWeights(pair.down, pair.up, exact if same else pair.alpha)
    return layers


def _load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    saved = read_tree(folder, "optimizer")
    try:
        optimizer.load_state_dict(saved)
        _keep_formats(optimizer, saved["state"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"The optimizer's part of {folder} does not fit to this run: {error}. Use the same network settings.", FIELD
        ) from error


def _keep_formats(optimizer: Optimizer, saved: Mapping[Any, Mapping[str, Any]]) -> None:
    """Undo torch's conversion of an optimizer's tensors to the number format of the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[parameters[index]]
        for name, value in values.items():
            loaded = state.get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                state[name] = value.to(loaded.device)


def _load_schedule(folder: Path, schedule: Schedule) -> None:
    saved = read_tree(folder, "schedule")
    try:
        schedule.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"The schedule's part of {folder} does not fit to this run: {error!r}.", FIELD) from error


def _changed(before: Mapping[str, Any], options: TrainOptions | None) -> bool:
    """Whether the learning rate of some step is another one by these options."""
    if options is None:
        return False
    now = options.model_dump(mode="json")
    ratios = [_arguments(values, "network_args").get("loraplus_lr_ratio") for values in (before, now)]
    return ratios[0] != ratios[1] or any(before.get(name, now[name]) != now[name] for name in _SCHEDULE_OPTIONS)


def _changed_arguments(before: Mapping[str, Any], options: TrainOptions | None) -> set[str]:
    """Names of the optimizer's arguments that were given, taken back, or given another value."""
    if options is None:
        return set()
    old, new = (_arguments(values, "optimizer_args") for values in (before, options.model_dump(mode="json")))
    return {name for name in old.keys() | new.keys() if name != "lr" and old.get(name) != new.get(name)}


def _arguments(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return key_values(values.get(name, []), name)


def _run_anew(optimizer: Optimizer, schedule: Schedule, made: list[dict[str, Any]], steps: int) -> None:
    """Bring a new schedule to `steps`, from the learning rates that the new run began with."""
    for group, fresh in zip(optimizer.param_groups, made, strict=True):
        group.update({name: fresh[name] for name in ("lr", "initial_lr") if name in fresh})
        if "initial_lr" not in fresh:
            group.pop("initial_lr", None)
    with warnings.catch_warnings():
        # torch supposes that steps of the optimizer were forgotten; they were done before.
        warnings.filterwarnings("ignore", message="Detected call of", category=UserWarning)
        for _ in range(steps):
            schedule.step()
