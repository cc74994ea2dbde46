"""The loop of training: steps, epochs, and what happens between two steps (saves, samples, validation, requests)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from backend.config.train import TrainOptions
from backend.data.epochs import Length
from backend.errors import EngineError, Problem, Stopped
from backend.lora.formats import LoraWeights
from backend.lora.trainable import TrainableLora
from backend.progress import Reporter
from backend.training.checkpoints import Checkpoints, Why
from backend.training.draws import reseed
from backend.training.due import Due
from backend.training.inputs import make_inputs
from backend.training.loss import band_losses, flow_loss
from backend.training.optimizers import learning_rates, set_mode
from backend.training.processes import Processes
from backend.training.requests import REPEATABLE, STOPS, RequestName, Requests
from backend.training.samples import Sampler, shown_epoch
from backend.training.schedules import Schedule
from backend.training.shared_forwards import SharedForwards
from backend.training.state import Position, save_state
from backend.training.step_meter import StepFacts, TrainingMeter
from backend.training.stream import BatchStream
from backend.training.trackers import Trackers
from backend.training.training_set import Batch, TrainingSet
from backend.training.transformer import TrainingTransformer
from backend.training.validation import Validation


@dataclass
class Parts:
    """Everything that the loop works with; `sampler` and `validation` are None where nothing is to be made of them.

    `extra` goes into every state: what resuming compares.
    """

    options: TrainOptions
    reporter: Reporter
    processes: Processes
    transformer: TrainingTransformer
    training_set: TrainingSet
    stream: BatchStream
    lora: TrainableLora
    optimizer: Optimizer
    schedule: Schedule
    checkpoints: Checkpoints
    requests: Requests
    meter: TrainingMeter
    trackers: Trackers
    sampler: Sampler | None
    validation: Validation | None
    due: Due
    seed: int
    length: Length
    extra: Mapping[str, Any]


class TrainingLoop:
    """Trains from a position to the end of the plan.

    Attributes:
        position: where the training stands now.
        saved: LoRA files that were written, in order; older ones may have been deleted again.
    """

    def __init__(self, parts: Parts, position: Position) -> None:
        self.saved: list[Path] = []
        self._parts = parts
        self._options = parts.options
        self.position = position
        self._parameters = list(parts.lora.named_parameters().values())
        self._forwards = SharedForwards(parts.processes, parts.transformer)
        self._leaving = False
        self._bad_in_a_row = 0

    def run(self) -> None:
        """Train; the LoRA is saved at the end.

        Raises:
            Stopped: it was asked for; says what was saved.
            EngineError: phase "train"; numbers that are not finite, too often in a row.
            UserError: a cache that was damaged meanwhile, a full disk.
        """
        parts = self._parts
        self._training()
        if self.position.step == 0:
            self._look(first=True)
        parts.meter.begin()
        while self.position.step < parts.length.total_steps:
            self._epoch()

    def _epoch(self) -> None:
        """The rest of the epoch at hand, or of the training if that ends before."""
        epoch = self.position.epoch
        sizes = [len(numbers) for numbers in self._parts.training_set.batches(epoch)]
        with closing(self._parts.stream.epoch(epoch, self.position.batch)) as stream:
            while self.position.epoch == epoch and self.position.step < self._parts.length.total_steps:
                self._answer_requests()
                self._step(stream, sizes)
                self._after_step()
            if self.position.epoch > epoch:
                # The stream learns that its epoch is over, so that what it has read of the next one is kept.
                left = next(stream, None)
                assert left is None

    # --- one step --------------------------------------------------------------------------------------------------

    def _step(self, stream: Generator[tuple[int, Batch]], sizes: list[int]) -> None:
        """One optimizer step over the next batches of all processes."""
        parts, here = self._parts, self.position
        last = min(here.batch + self._options.gradient_accumulation_steps * parts.processes.count, len(sizes))
        numbers = range(here.batch, last)
        sigmas, losses = self._gradients(stream, numbers, sizes)
        parts.processes.mean_gradients(self._parameters, len(numbers))
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None]))
        # Every process sees the same sums, so all of them decide alike.
        finite = bool(torch.isfinite(losses).all()) and norm < float("inf")
        largest = self._update(norm) if finite else None
        rates = learning_rates(parts.optimizer)
        self._advance_schedule(finite)
        parts.optimizer.zero_grad(set_to_none=True)
        self.position = Position(here.step + 1, here.epoch, last)
        if last == len(sizes):
            self.position = Position(here.step + 1, here.epoch + 1, 0)
        self._tell(
            StepFacts(
                step=here.step + 1,
                epoch=here.epoch + 1,
                loss=float(losses.mean()) if finite else None,
                grad_norm=norm if finite else None,
                bands=band_losses(sigmas, losses) if finite else [None] * 5,
                rates=rates,
                max_norm=largest,
            )
        )

    def _gradients(
        self, stream: Generator[tuple[int, Batch]], numbers: range, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Run this process's batches of `numbers`; returns sigma and loss of every sample of all of them, float64 [N].

        Each process fills in its own samples; the sum over the processes has all.
        """
        parts = self._parts
        offsets, total = {}, 0
        for number in numbers:
            offsets[number] = total
            total += sizes[number]
        measured = torch.zeros(2, total, dtype=torch.float64)
        for number in numbers:
            if number % parts.processes.count != parts.processes.rank:
                continue
            given, batch = next(stream)
            assert given == number, f"The stream gave batch {given} instead of {number}."
            place = slice(offsets[number], offsets[number] + sizes[number])
            measured[0, place], measured[1, place] = self._add_gradients(number, batch)
        self._keep_company(numbers)
        # MPS knows no float64; a loss loses nothing that anybody sees by travelling as float32.
        sigmas, losses = parts.processes.sum(measured.float()).double()
        return sigmas, losses

    def _add_gradients(self, number: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward pass of one batch; returns sigma and loss of its samples, float64 on the CPU."""
        parts, epoch = self._parts, self.position.epoch
        reseed(parts.seed, epoch, number)
        inputs = make_inputs(
            batch, self._options, parts.seed, epoch, number, parts.transformer.config.in_channels,
            parts.processes.device,
        )  # fmt: skip
        loss, per_sample = flow_loss(parts.transformer(inputs), inputs)
        loss.backward()
        return inputs.sigmas.detach().double().cpu(), per_sample.double().cpu()

    def _keep_company(self, numbers: range) -> None:
        """With a split model, run a batch for nothing while other processes have one more than this one.

        Where the last step of an epoch has fewer batches, they need this one's share of the weights all the same.
        """
        parts = self._parts
        rank, count = parts.processes.rank, parts.processes.count
        own = sum(number % count == rank for number in numbers)
        missing = -(-len(numbers) // count) - own
        if not parts.processes.sharded or missing <= 0:
            return
        gradients = [parameter.grad for parameter in self._parameters]
        number = numbers[0]
        batch = parts.training_set.read(parts.training_set.batches(self.position.epoch)[number])
        for _ in range(missing):
            for parameter in self._parameters:
                parameter.grad = None  # Else these gradients were added to the true ones.
            self._add_gradients(number, batch)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _update(self, norm: float) -> float | None:
        """Clip, step, limit the norms; returns the largest norm of a layer's difference if it is limited."""
        parts, options = self._parts, self._options
        if options.max_grad_norm > 0:
            # As torch's clip_grad_norm_, whose norm is needed before it is known whether to step at all.
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters, options.max_grad_norm, torch.tensor(norm, device=parts.processes.device)
            )
        parts.optimizer.step()
        if options.scale_weight_norms is None:
            return None
        return parts.lora.scale_norms(options.scale_weight_norms).largest

    def _advance_schedule(self, stepped: bool) -> None:
        """A skipped step counts in the schedule, which follows the position; torch warns of it if it is the first."""
        with warnings.catch_warnings():
            if not stepped:
                warnings.simplefilter("ignore", UserWarning)
            self._parts.schedule.step()

    def _tell(self, facts: StepFacts) -> None:
        """Record the step; end the training when numbers have not been finite for too long."""
        self._parts.trackers.step(self._parts.meter.step(facts))
        if self.position.batch == 0:
            self._parts.trackers.epoch(facts.step)
        self._bad_in_a_row = self._bad_in_a_row + 1 if facts.skipped else 0
        if self._bad_in_a_row >= self._options.max_nonfinite_steps:
            raise EngineError(
                f"{self._bad_in_a_row} steps in a row, up to step {facts.step}, had a loss or a gradient that is not a "
                "number; the LoRA was not changed by them, and nothing was saved now. Lower --learning_rate, check "
                "the caches, or go on from an earlier state.",
                "train",
            )

    # --- between two steps ------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Save, measure and sample what is due at this position."""
        here, due = self.position, self._parts.due
        finished, epoch_ended = here.step >= self._parts.length.total_steps, here.batch == 0
        leaving = self._leaving and epoch_ended
        if finished:
            self._save("end")
        elif due.save_epoch(here):
            self._save("epoch", with_state=leaving)
        elif leaving:
            self._save("stop")
        if due.save_step(here):
            self._save("step")
        self._look()
        if leaving and not finished:
            raise self._stopped("Stopped after the epoch, as asked.", saved=True)

    def _look(self, first: bool = False) -> None:
        """Validate and sample, if that is due at this position."""
        here, due = self.position, self._parts.due
        validate, sample = (
            (due.validate(here), due.sample(here)) if not first else (True, self._options.sample_at_first)
        )
        if validate:
            self._validate()
        if sample:
            self._sample()

    def _save(self, why: Why, with_state: bool = False) -> None:
        parts = self._parts
        wanted = with_state or parts.checkpoints.wants_state(why)
        with self._aside("save", f"Saving at step {self.position.step}"):
            saver = self._write_state if wanted else None
            written = parts.checkpoints.save(self.position, why, _AsUsed(self), saver).lora
        if written is not None:
            self.saved.append(written)

    def _write_state(self, folder: Path) -> None:
        parts = self._parts
        save_state(
            folder, self.position, parts.seed, parts.lora, parts.optimizer, parts.schedule, self._options, parts.extra,
            parts.processes.rank, parts.processes.count, parts.processes.barrier,
        )  # fmt: skip

    def _validate(self) -> None:
        parts, here = self._parts, self.position
        if parts.validation is None:
            return
        if not parts.processes.first:
            self._follow("validate")
            return
        with (
            self._aside("validate", f"Validating at step {here.step}"), self.as_used(),
            self._forwards.leading("validate"),
        ):  # fmt: skip
            result = parts.validation.run(parts.transformer.predict_no_grad)
        parts.reporter.journal.emit(
            "validation", step=here.step, epoch=shown_epoch(here), loss=result.loss, by_sigma=result.by_sigma,
            items=result.items, took_seconds=round(result.seconds, 3),
        )  # fmt: skip
        parts.reporter.say(f"Validation at step {here.step}: loss {result.loss:.4f} of {result.items} items")
        parts.trackers.validation(result.loss, here.step)

    def _sample(self) -> None:
        parts = self._parts
        if self._options.sample_prompts is None:
            return
        if not parts.processes.first:
            self._follow("sample")
            return
        assert parts.sampler is not None
        with (
            self._aside("sample", f"Sampling at step {self.position.step}"), self.as_used(),
            self._forwards.leading("sample"),
        ):  # fmt: skip
            parts.sampler.make(parts.transformer, self.position, self._stop_is_waiting)

    def _follow(self, phase: str) -> None:
        """Take part in what the first process does with a split model; with a whole one it needs nobody."""
        if self._parts.processes.sharded:
            with self._aside(phase, "Taking part"), self.as_used():
                self._forwards.follow()

    def _stop_is_waiting(self) -> bool:
        return bool(self._parts.requests.poll() & {"stop", "stop_and_save"})

    @contextmanager
    def _aside(self, phase: str, message: str) -> Iterator[None]:
        """Do something that is no step: announced, timed by itself, and followed by the phase of training again."""
        parts = self._parts
        parts.reporter.journal.emit("phase", phase=phase, message=message)
        parts.reporter.phase_name = phase
        with parts.meter.aside(phase):
            yield
        self._training()

    def _training(self) -> None:
        self._parts.reporter.phase_name = "train"
        self._parts.reporter.journal.emit("phase", phase="train", message="Training")

    @contextmanager
    def as_used(self) -> Iterator[None]:
        """The weights as they are to be used: a schedule-free optimizer trains with others than it ends with.

        Afterwards they are those of the training again, bit for bit: its own way back rounds.
        """
        optimizer = self._parts.optimizer
        if not hasattr(optimizer, "eval"):
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        set_mode(optimizer, train=False)
        try:
            yield
        finally:
            set_mode(optimizer, train=True)
            with torch.no_grad():
                for parameter, before in zip(self._parameters, kept, strict=True):
                    parameter.copy_(before)

    def weights_as_used(self) -> dict[str, LoraWeights]:
        """Copies of the LoRA's layers as they are to be used."""
        with self.as_used():
            return self._parts.lora.weights()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _answer_requests(self) -> None:
        """Do what the page or a signal asks for; of several processes all do it at the same step."""
        parts = self._parts
        asked = parts.processes.any_of(parts.requests.poll(), [*STOPS, *REPEATABLE])
        if "stop" in asked:
            self._answered("stop")
            raise self._stopped("Stopped, as asked.", saved=False)
        if "stop_and_save" in asked:
            self._save("stop")
            self._answered("stop_and_save")
            raise self._stopped("Stopped and saved, as asked.", saved=True)
        if "stop_after_epoch" in asked:
            self._leaving = True
            self._answered("stop_after_epoch")
        if "save" in asked:
            self._save("request")
            self._answered("save")
        if "sample" in asked:
            if parts.sampler is None and parts.processes.first:
                parts.reporter.warning(Problem("sample_prompts", "is not given, so there is nothing to sample."))
            self._sample()
            self._answered("sample")

    def _answered(self, name: RequestName) -> None:
        self._parts.requests.answered(name, step=self.position.step)

    def _stopped(self, reason: str, *, saved: bool) -> Stopped:
        here = self.position
        done = f"{here.step} of {self._parts.length.total_steps} steps are done."
        left = "" if saved else " Nothing was saved now; what was saved before is whole."
        return Stopped(f"{reason} {done}{left}", step=here.step)


class _AsUsed:
    """The LoRA for a file: its weights as they are to be used."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop

    def weights(self) -> dict[str, LoraWeights]:
        """Copies on the CPU."""
        return self._loop.weights_as_used()
