"""Training, whole: check, load what is trained on, load what is trained, and run the loop.

Memory is used one after the other: encoders and VAE for the samples first, then the DiT, which stays.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from backend.config.checks import weight_paths
from backend.config.dataset import load_dataset_config
from backend.config.resume_diff import (
    BASE_FACT,
    BATCHES_FACT,
    DATASET_FACT,
    PROCESSES_FACT,
    differences,
    restarts_epoch,
)
from backend.config.state_record import StateRecord, latest_state, read_record
from backend.config.train import TrainOptions
from backend.config.train_arguments import network_arguments
from backend.config.train_checks import check_train
from backend.data.epochs import plan_length
from backend.errors import Problem, Problems, Stopped, UserError
from backend.files import fingerprint
from backend.lora.metadata import lora_metadata
from backend.lora.trainable import TrainableLora, warm_start
from backend.model.attention import resolve_attention
from backend.model.device import resolve_dtype
from backend.progress import Reporter
from backend.sampling.phases import naming_faults, phase
from backend.training.checkpoints import Checkpoints, checkpoint_folder
from backend.training.dataset import load_training_set
from backend.training.due import Due
from backend.training.loop import Parts, TrainingLoop
from backend.training.optimizers import make_optimizer, optimizer_notices
from backend.training.processes import Processes
from backend.training.requests import RequestName, Requests
from backend.training.samples import Sampler
from backend.training.schedules import Schedule, make_schedule, schedule_notices
from backend.training.sharding import sharding_problems
from backend.training.show_timesteps import show_timesteps
from backend.training.state import Position, load_state
from backend.training.step_meter import TrainingMeter
from backend.training.stream import BatchStream
from backend.training.trackers import Trackers
from backend.training.training_set import TrainingSet
from backend.training.transformer import TrainingTransformer
from backend.training.validation import Validation

_DTYPES = {"no": "float32", "bf16": "bfloat16", None: None}


def train(options: TrainOptions, reporter: Reporter, run_dir: Path | None = None) -> list[str]:
    """Train as `options` say; returns the paths of the LoRA files that this run wrote and kept.

    Raises:
        Problems: anything that is wrong with the request, the dataset or the state, found before weights are loaded
            where that is possible.
        EngineError: a fault of one phase.
        Stopped: somebody asked for it; says what was saved.
    """
    problems = check_train(options, run_dir)
    if problems:
        raise Problems(problems)
    if options.show_timesteps is not None:
        show_timesteps(options, reporter, run_dir)
        return []
    launched = Processes(options)
    contradictions = sharding_problems(options, os.environ) if launched.sharded else []
    if contradictions:
        raise Problems(contradictions)
    with launched as processes:
        # Caches that are missing may have been written by all of them just before.
        processes.barrier()
        return _Training(options, reporter, run_dir, processes).run()


class _Learner(NamedTuple):
    """What learns, and what teaches it."""

    transformer: TrainingTransformer
    lora: TrainableLora
    optimizer: Optimizer
    schedule: Schedule


class _Training:
    """One training: its parts are made in the order of the methods."""

    def __init__(self, options: TrainOptions, reporter: Reporter, run_dir: Path | None, processes: Processes) -> None:
        self.options, self.reporter, self.run_dir, self.processes = options, reporter, run_dir, processes
        self.paths = weight_paths(options)
        self.dtype = resolve_dtype(_DTYPES[options.mixed_precision], processes.device)
        self.folder = checkpoint_folder(options, run_dir)
        self.requests = Requests(run_dir if processes.first else None, reporter)

    def run(self) -> list[str]:
        """Load, prepare, loop, end; signals count as requests all the while."""
        with self.requests:
            return self._run()

    def _run(self) -> list[str]:
        with phase(self.reporter, "load", "Looking at dataset and state"):
            self._look()
        self._end_if_asked()
        sampler = self._sampler()
        self._end_if_asked()
        with phase(self.reporter, "load", f"Loading the model on {self.processes.device} ({_short(self.dtype)})"):
            learner = self._learner()
        with ExitStack() as stack:
            loop = TrainingLoop(self._parts(learner, sampler, stack), self.start)
            with naming_faults("train", "Training"):
                loop.run()
        return [self._shown(path) for path in dict.fromkeys(loop.saved) if path.exists()]

    def _look(self) -> None:
        """Everything that can be known without the model."""
        options = self.options
        notices = [*optimizer_notices(options), *schedule_notices(options)]
        self.state = self._state_to_resume()
        self.seed = self._choose_seed()
        self.training_set = self._load_training_set(notices)
        self.length = plan_length(
            [(group.shown, group.batch_size) for group in self.training_set.groups], self.processes.count,
            options.gradient_accumulation_steps, options.max_train_steps, options.max_train_epochs,
        )  # fmt: skip
        self.extra = self._extra()
        self.start = self._start()
        if self.processes.first:
            together = f", {self.processes.count} processes" if self.processes.count > 1 else ""
            self.reporter.say(
                f"{len(self.training_set.items)} items, {self.length.batches_per_epoch} batches and "
                f"{self.length.steps_per_epoch} steps an epoch, {self.length.total_steps} steps in "
                f"{self.length.epochs} epochs, seed {self.seed}{together}"
            )

    def _learner(self) -> _Learner:
        """What learns and what teaches it, as the state left them if there is one."""
        options = self.options
        transformer = self._transformer()
        lora = self._lora(transformer)
        groups = lora.param_groups(options.learning_rate, network_arguments(options).loraplus_lr_ratio)
        optimizer = make_optimizer(groups, options)
        schedule = make_schedule(optimizer, options, self.length.total_steps)
        if self.state is not None:
            load_state(self.state.folder, lora, optimizer, schedule, self.processes.rank, self.processes.count, options)
            self._tell_resume(self.state)
        return _Learner(transformer, lora, optimizer, schedule)

    def _parts(self, learner: _Learner, sampler: Sampler | None, stack: ExitStack) -> Parts:
        """What the loop works with; `stack` closes what has to be closed."""
        options, processes, length = self.options, self.processes, self.length
        stream = BatchStream(
            self.training_set, options.max_data_loader_n_workers, options.persistent_data_loader_workers,
            processes.rank, processes.count,
        )  # fmt: skip
        stack.callback(stream.close)
        trackers = Trackers(options, length.steps_per_epoch, first=processes.first)
        stack.callback(trackers.close)
        validation = self._validation(learner.transformer)
        due = Due(options, length, held_out=validation is not None)
        make_metadata = partial(lora_metadata, options, self._facts())
        return Parts(
            options=options,
            reporter=self.reporter,
            processes=processes,
            transformer=learner.transformer,
            training_set=self.training_set,
            stream=stream,
            lora=learner.lora,
            optimizer=learner.optimizer,
            schedule=learner.schedule,
            checkpoints=Checkpoints(options, self.run_dir, self.reporter, make_metadata, processes.rank),
            requests=self.requests,
            meter=TrainingMeter(self.reporter, length.total_steps, length.epochs, due.upcoming, processes.device),
            trackers=trackers,
            sampler=sampler,
            validation=validation,
            due=due,
            seed=self.seed,
            length=length,
            extra=self.extra,
        )

    # --- what is trained on -----------------------------------------------------------------------------------------

    def _state_to_resume(self) -> StateRecord | None:
        """The state that --resume names, checked to be whole."""
        given = self.options.resume
        if given is None:
            return None
        if given != "latest":
            return read_record(given)
        found = latest_state(self.folder, self.options.output_name)
        if found is None:
            raise UserError(
                f"there is no whole state of {self.options.output_name} in {self.folder}. Leave --resume out to start "
                "from the beginning.",
                "resume",
            )
        return read_record(found)

    def _choose_seed(self) -> int:
        """The seed that is asked for, else that of the state, else a new one; the same in all processes."""
        seed = self.options.seed
        if seed is None:
            seed = self.state.seed if self.state is not None else secrets.randbelow(2**32)
        seed = self.processes.from_first(seed)
        self.reporter.journal.emit(
            "phase", phase="load", message=f"The seed is {seed}", seed=seed, device=str(self.processes.device),
            dtype=_short(self.dtype), processes=self.processes.count, distributed=self.processes.distributed_type,
        )  # fmt: skip
        return seed

    def _load_training_set(self, notices: list[Problem]) -> TrainingSet:
        config = load_dataset_config(str(self.options.dataset_config))
        training_set = load_training_set(self.options, config, self.seed)
        if self.processes.first:
            for notice in (*notices, *config.notices, *training_set.notices):
                self.reporter.warning(notice)
        return training_set

    def _extra(self) -> dict[str, Any]:
        """What a state says about the run besides its options, to be compared on resuming."""
        assert self.paths.dit is not None
        return {
            DATASET_FACT: self.training_set.fingerprint,
            BASE_FACT: fingerprint(self.paths.dit),
            BATCHES_FACT: self.training_set.batches_per_epoch,
            PROCESSES_FACT: self.processes.count,
        }

    def _facts(self) -> dict[str, Any]:
        """What the files say about the run beyond its options."""
        return {
            "session_id": str(secrets.randbelow(2**32)),
            "started_at": time.time(),
            "seed": self.seed,
            "total_steps": self.length.total_steps,
            "epochs": self.length.epochs,
            "dit": self.paths.dit,
            "vae": self.paths.vae,
            "base_fingerprint": self.extra[BASE_FACT],
            "dataset": self.training_set.facts(),
        }

    def _start(self) -> Position:
        """Where training begins; refuses what cannot go on from the state, tells what will be another training."""
        state = self.state
        if state is None:
            return Position(0, 0, 0)
        found = differences(state.options, self.options, state.extra | {"seed": state.seed}, self.extra)
        impossible = [Problem(one.name, one.why) for one in found if one.kind == "impossible"]
        if impossible:
            raise Problems(impossible)
        if self.processes.first:
            for one in found:
                if one.kind == "meaning":
                    self.reporter.warning(
                        Problem(one.name, f"differs from the state: {one.old} -> {one.new}. {one.why}")
                    )
        position = state.position
        if position.step >= self.length.total_steps:
            raise UserError(
                f"the state has {position.step} steps done, and the training has {self.length.total_steps}: nothing is "
                "left to do. Raise --max_train_steps or --max_train_epochs.",
                "resume",
            )
        # The place in an epoch whose batches are others now means nothing.
        restarts = restarts_epoch(found) or position.batch > self.extra[BATCHES_FACT]
        return Position(position.step, position.epoch, 0) if restarts else position

    def _end_if_asked(self) -> None:
        """A stop that comes while things are loaded; nothing has been trained, so nothing is saved."""
        stops: tuple[RequestName, ...] = ("stop", "stop_and_save")
        asked = self.processes.any_of(self.requests.poll(), stops)
        if asked:
            for name in stops:
                self.requests.answered(name, step=self.start.step)
            raise Stopped("Stopped before the first step; nothing was saved.", step=self.start.step)

    # --- what is trained --------------------------------------------------------------------------------------------

    def _sampler(self) -> Sampler | None:
        if self.options.sample_prompts is None or not self.processes.first:
            return None
        folder = (self.run_dir or self.folder) / "samples"
        sampler = Sampler(self.options, self.paths, self.processes.device, self.dtype, self.reporter, folder, self.seed)
        sampler.prepare()
        return sampler

    def _transformer(self) -> TrainingTransformer:
        device = self.processes.device
        attention = resolve_attention(self.options.attention, device=device, dtype=self.dtype)
        mesh = self.processes.mesh()
        transformer = TrainingTransformer(self.options, self.paths, device, self.dtype, attention, mesh)
        if mesh is not None and self.processes.first:
            self.reporter.say(f"FSDP: each of {self.processes.count} processes keeps its share of every block")
        if self.processes.first:
            for notice in transformer.notices:
                self.reporter.warning(notice)
        for height, width in sorted({group.shape[1:] for group in self.training_set.groups}):
            transformer.check_size(height, width)
        return transformer

    def _lora(self, transformer: TrainingTransformer) -> TrainableLora:
        """The LoRA, attached; with --network_weights it starts from a file."""
        options, arguments = self.options, network_arguments(self.options)
        rank, alpha, start = options.network_dim, options.network_alpha, None
        if options.network_weights is not None:
            start = warm_start(options.network_weights)
            if options.dim_from_weights:
                rank, alpha = start.rank, start.alpha
        lora = TrainableLora.attach(
            transformer.model, rank, alpha, seed=self.seed, dropout=options.network_dropout,
            rank_dropout=arguments.rank_dropout, module_dropout=arguments.module_dropout,
            include=arguments.include_patterns, exclude=arguments.exclude_patterns,
        )  # fmt: skip
        if start is not None:
            lora.load(start.layers, source=str(options.network_weights))
        if self.processes.first:
            self.reporter.say(f"{lora.summary(arguments.verbose)}, attention {transformer.attention}")
        lora.training(True)
        return lora

    def _tell_resume(self, state: StateRecord) -> None:
        start = self.start
        message = f"Going on after step {start.step} of {self.length.total_steps}"
        self.reporter.journal.emit(
            "phase", phase="resume", message=message, step=start.step, epoch=start.epoch + 1, path=str(state.folder)
        )
        self.reporter.say(f"{message}, from {state.folder}")

    def _validation(self, transformer: TrainingTransformer) -> Validation | None:
        options = self.options
        if self.training_set.held_out:
            return Validation(self.training_set, options, transformer.config.in_channels, self.processes.device)
        for name in ("validate_every_n_steps", "validate_every_n_epochs"):
            if getattr(options, name) is not None and self.processes.first:
                text = "changes nothing: no item is held out. Set validation_split in the dataset configuration."
                self.reporter.warning(Problem(name, text))
        return None

    def _shown(self, path: Path) -> str:
        """The path as the journal names files: relative inside the run folder."""
        path = path.absolute()
        if self.run_dir is not None and path.is_relative_to(self.run_dir.absolute()):
            return path.relative_to(self.run_dir.absolute()).as_posix()
        return str(path)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
