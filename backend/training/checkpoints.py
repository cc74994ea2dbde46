"""The files that training leaves: their names, their number format, their records, and how many of them are kept."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from backend.config.state_record import COMPLETE, Position, sha256_of
from backend.config.train import TrainOptions
from backend.errors import Problem, UserError
from backend.files import require_free_space
from backend.lora.formats import LoraWeights, write_lora
from backend.progress import Reporter

Why = Literal["epoch", "step", "end", "request", "stop"]
#: Gets the position and the layers exactly as they go into the file (number format included).
MakeMetadata = Callable[[Position, Mapping[str, LoraWeights]], Mapping[str, str]]
#: Writes a state to the folder that it is given; every process calls it.
StateSaver = Callable[[Path], None]
_PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SPACE_FOR_REST = 1 << 20
_LEFTOVER_SECONDS = 600.0
_STATE = "-state"
#: What stands before the number in a name -> the number.
_MARKS = {"-": r"(\d{6,})", "-step": r"(\d{8,})"}


class HasWeights(Protocol):
    """What is saved: layers by their dotted path in the model."""

    def weights(self) -> dict[str, LoraWeights]:
        """Copies on the CPU."""
        ...


@dataclass(frozen=True)
class Saved:
    """What one save wrote; `lora` is None in processes other than the first, `state` where none was asked for."""

    lora: Path | None
    state: Path | None


def checkpoint_folder(options: TrainOptions, run_dir: Path | None) -> Path:
    """Where the files of a run lie: --output_dir, else checkpoints in the run folder.

    Raises:
        UserError: there is neither.
    """
    if options.output_dir is not None:
        return Path(options.output_dir)
    if run_dir is None:
        raise UserError("Say where the LoRA files shall lie.", "output_dir")
    return run_dir / "checkpoints"


def epochs_done(position: Position) -> int:
    """Epochs that have begun and whose work is in the weights: the number in the name of a file saved by epoch."""
    return position.epoch + (1 if position.batch else 0)


class Checkpoints:
    """Saves LoRA files and states of one run under the names that users of musubi know.

    `<name>-000005.safetensors` after epoch 5, `<name>-step00001000.safetensors` after step 1,000 (also on request),
    `<name>.safetensors` at the end; states have the same stems with `-state`. Of several processes, the first writes,
    records and deletes; the others take part in states only.

    Deleted are files saved by epoch beyond the newest --save_last_n_epochs, and files saved by step that lie more than
    --save_last_n_steps steps back; the options ending in _state say the same for states, and are those of the files
    when they are not given. Only files of this run are deleted: those that it wrote, and with --resume those of the
    same name from before; never one of a later step than the current one, never a file that was asked for in between.
    """

    def __init__(
        self,
        options: TrainOptions,
        run_dir: Path | None,
        reporter: Reporter,
        make_metadata: MakeMetadata,
        rank: int = 0,
    ) -> None:
        self.folder = checkpoint_folder(options, run_dir)
        self._options = options
        self._run_dir = run_dir
        self._reporter = reporter
        self._make_metadata = make_metadata
        self._rank = rank
        self._written: set[Path] = set()
        if rank == 0 and options.resume is None:
            self._warn_of_earlier_files()

    def _warn_of_earlier_files(self) -> None:
        """Say once that files of an earlier run lie under the names of this one."""
        name = self._options.output_name
        final = self.folder / f"{name}.safetensors"
        others = [self.folder / f"{name}{_STATE}"]
        for mark in _MARKS:
            others += [*_numbered(self.folder, name, mark, ".safetensors").values()]
            others += [*_numbered(self.folder, name, mark, _STATE).values()]
        text = ""
        if final.exists():
            text = f"{final} is there already and will be overwritten at the end. Choose another name to keep it."
        elif any(path.exists() for path in others):
            text = (
                f"{self.folder} holds files of an earlier run of this name. Those with the same numbers will be "
                "overwritten, and --resume latest may take its states. Choose another name to tell the runs apart."
            )
        if text:
            self._reporter.warning(Problem("output_name", text))

    def wants_state(self, why: Why) -> bool:
        """Whether a state belongs to this save; to one that was asked for always, so that nothing is lost by it."""
        if why in ("request", "stop"):
            return True
        return self._options.save_state or (why == "end" and self._options.save_state_on_train_end)

    def save(self, position: Position, why: Why, lora: HasWeights, state_saver: StateSaver | None) -> Saved:
        """Write the LoRA, then the state if there is a saver, then delete what is not to be kept; all are recorded.

        The file gets `lora.weights()`: with a schedule-free optimizer these are the averaged ones, while the state
        needs those of the training mode, so the saver must be given apart.

        Raises:
            UserError: no space, or no right to write. Files that were there before are whole; nothing is deleted.
        """
        stem = self._stem(position, why)
        written = None
        if self._rank == 0:
            self._sweep()
            written = self.folder / f"{stem}.safetensors"
            self._save_lora(written, position, why, lora.weights())
            self._written.add(written)
        state = None
        if state_saver is not None:
            state = self.folder / f"{stem}{_STATE}"
            began = time.perf_counter()
            state_saver(state)
            if self._rank == 0:
                self._written.add(state)
                self._record(state, "state", position, why, began, bytes=_size(state))
        if self._rank == 0:
            self._delete_old(position, with_states=state is not None)
        return Saved(written, state)

    def _stem(self, position: Position, why: Why) -> str:
        name = self._options.output_name
        if why == "end":
            return name
        return f"{name}-{epochs_done(position):06d}" if why == "epoch" else f"{name}-step{position.step:08d}"

    def _save_lora(self, path: Path, position: Position, why: Why, weights: Mapping[str, LoraWeights]) -> None:
        began = time.perf_counter()
        dtype = _PRECISIONS[self._options.save_precision]
        layers = {
            name: LoraWeights(pair.down.to(dtype), pair.up.to(dtype), pair.alpha) for name, pair in weights.items()
        }
        bytes_needed = sum(pair.down.nbytes + pair.up.nbytes for pair in layers.values())
        require_free_space(self.folder, bytes_needed + _SPACE_FOR_REST, "output_dir")
        write_lora(path, layers, metadata=self._make_metadata(position, layers))
        self._record(path, "lora", position, why, began, bytes=path.stat().st_size, sha256=sha256_of(path))

    def _record(self, path: Path, kind: str, position: Position, why: Why, began: float, **facts: int | str) -> None:
        shown = path.absolute()
        if self._run_dir is not None and shown.is_relative_to(self._run_dir.absolute()):
            shown = shown.relative_to(self._run_dir.absolute())
        self._reporter.journal.emit(
            "checkpoint", step=position.step, epoch=max(epochs_done(position), 1), path=shown.as_posix(), kind=kind,
            why=why, took_seconds=round(time.perf_counter() - began, 3), **facts,
        )  # fmt: skip
        self._reporter.say(f"Saved: {path}")

    def _sweep(self) -> None:
        """Remove what a writer of this run's files left behind when it was killed; one that works touches its file."""
        # The names are those of backend.files.atomic_path, which begin with 20 characters of the final name.
        pattern = re.compile(rf"\.{re.escape(self._options.output_name[:20])}.*\.[0-9a-f]{{8}}\.tmp\.safetensors")
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)

    # --- deleting what is not to be kept ---------------------------------------------------------------------------

    def _delete_old(self, position: Position, with_states: bool) -> None:
        """Delete in both series; states only when a newer one has just been written."""
        options = self._options
        epochs, steps = options.save_last_n_epochs, options.save_last_n_steps
        self._delete(".safetensors", position, epochs, steps)
        if with_states:
            self._delete(
                _STATE, position, options.save_last_n_epochs_state or epochs, options.save_last_n_steps_state or steps
            )

    def _delete(self, suffix: str, position: Position, last_epochs: int | None, last_steps: int | None) -> None:
        name, options = self._options.output_name, self._options
        old: list[Path] = []
        if last_epochs is not None:
            found = _numbered(self.folder, name, "-", suffix)
            reached = sorted(number for number in found if number <= epochs_done(position))
            old += [found[number] for number in reached[:-last_epochs]]
        if last_steps is not None and options.save_every_n_steps is not None:
            found = _numbered(self.folder, name, "-step", suffix)
            # Only those of the series: a file between two of its steps was asked for by somebody.
            in_series = [number for number in found if number % options.save_every_n_steps == 0]
            old += [found[number] for number in in_series if number < position.step - last_steps]
        for path in old:
            if path in self._written or options.resume is not None:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a file, or a state: that loses its mark first, so that a half deleted one never counts as whole."""
        try:
            if path.is_dir():
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            # One file too many is no reason to end a run.
            text = f"{path} could not be deleted: {error.strerror}. Delete it yourself."
            self._reporter.warning(Problem("output_dir", text))


def _numbered(folder: Path, name: str, mark: str, suffix: str) -> dict[int, Path]:
    """Files (states: folders that are whole) called like saves by epoch ("-") or by step ("-step"), by their number."""
    pattern = re.compile(re.escape(name) + mark + _MARKS[mark] + re.escape(suffix))
    if not folder.is_dir():
        return {}
    found = {path: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    wanted = [path for path in found if ((path / COMPLETE).is_file() if suffix == _STATE else path.is_file())]
    return {int(found[path][1]): path for path in wanted}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
