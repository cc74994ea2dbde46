"""What is due after a step, by the options that say how often; and how often it is still to come."""

from __future__ import annotations

from backend.config.state_record import Position
from backend.config.train import TrainOptions
from backend.data.epochs import Length


class Due:
    """Answers for one training; positions are those after a step, so epochs are full ones when their batch is 0."""

    def __init__(self, options: TrainOptions, length: Length, *, held_out: bool) -> None:
        """Settle the defaults: held-out items are measured after each epoch unless the options say when."""
        self._options, self._length = options, length
        by_steps, by_epochs = options.validate_every_n_steps, options.validate_every_n_epochs
        if by_steps is None and by_epochs is None:
            by_epochs = 1
        self._validation = (by_steps, by_epochs) if held_out else (None, None)
        sampling = options.sample_prompts is not None
        self._samples = (options.sample_every_n_steps, options.sample_every_n_epochs) if sampling else (None, None)

    def save_epoch(self, here: Position) -> bool:
        """Whether a file of this epoch is due; never at the last step, whose file is that of the end."""
        return not self._last(here) and _by_epoch(here, self._options.save_every_n_epochs)

    def save_step(self, here: Position) -> bool:
        """Whether a file of this step is due; never at the last step, whose file is that of the end."""
        return not self._last(here) and _by_step(here, self._options.save_every_n_steps)

    def validate(self, here: Position) -> bool:
        """Whether the held-out items are due; always at the last step."""
        by_steps, by_epochs = self._validation
        measured = by_steps is not None or by_epochs is not None
        return measured and (self._last(here) or _by_step(here, by_steps) or _by_epoch(here, by_epochs))

    def sample(self, here: Position) -> bool:
        """Whether samples are due."""
        by_steps, by_epochs = self._samples
        return _by_step(here, by_steps) or _by_epoch(here, by_epochs)

    def upcoming(self, step: int) -> dict[str, int]:
        """How often each is still to come after `step`, by the phases' names.

        At the last step there are the file of the end, which stands for all others, and a validation.
        """
        total, options = self._length.total_steps, self._options
        if step >= total:
            return {"save": 0, "validate": 0, "sample": 0}
        saves = self._between(step, total - 1, options.save_every_n_steps, options.save_every_n_epochs)
        validations = self._between(step, total - 1, *self._validation)
        return {
            "save": saves + 1,
            "validate": validations + (self._validation != (None, None)),
            "sample": self._between(step, total, *self._samples),
        }

    def _between(self, begin: int, end: int, every_steps: int | None, every_epochs: int | None) -> int:
        """How often something is due after step `begin` up to step `end`, by steps and by epochs."""
        count = 0
        if every_steps is not None:
            count += end // every_steps - begin // every_steps
        if every_epochs is not None:
            steps = every_epochs * self._length.steps_per_epoch
            count += end // steps - begin // steps
        return count

    def _last(self, here: Position) -> bool:
        return here.step >= self._length.total_steps


def _by_step(here: Position, every: int | None) -> bool:
    return every is not None and here.step > 0 and here.step % every == 0


def _by_epoch(here: Position, every: int | None) -> bool:
    return every is not None and here.batch == 0 and here.epoch > 0 and here.epoch % every == 0
