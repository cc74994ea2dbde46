"""The loss of held-out items, with the same noise and the same noise levels every time, so that numbers compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backend.training.draws import seed_of
from backend.training.inputs import ModelInputs, assemble, given_frames, latent_shape
from backend.training.loss import flow_loss
from backend.training.timesteps import TimestepDistribution
from backend.training.training_set import TrainingSet

if TYPE_CHECKING:
    from backend.config.train_steps import TrainStepsOptions


@dataclass(frozen=True)
class ValidationResult:
    """What one validation found.

    Attributes:
        loss: mean over items and noise levels, without weights; for image to video over frames that are not given.
        by_sigma: (sigma, mean over the items) for each noise level, rising.
        items: how many were measured.
        seconds: how long it took.
    """

    loss: float
    by_sigma: list[tuple[float, float]]
    items: int
    seconds: float


class Validation:
    """Measures held-out items one by one: no dropped captions, image to video always with its frames.

    An item's noise depends on its name alone, neither on the run's seed nor on the other items, and no random state of
    the training is touched. Noise levels are the middles of equal shares of the trained distribution.
    """

    def __init__(
        self, training_set: TrainingSet, options: TrainStepsOptions, in_channels: int, device: torch.device
    ) -> None:
        """Choose items and noise levels: at most `--max_validation_items`, spread evenly over the held-out ones.

        Args:
            in_channels, device: as for `backend.training.inputs.make_inputs`.

        Raises:
            UserError: the options of the timesteps contradict each other.
        """
        numbers = training_set.held_out_numbers
        count = min(len(numbers), options.max_validation_items)
        self.numbers = tuple(numbers[place * len(numbers) // count] for place in range(count))
        self.sigmas = TimestepDistribution.from_options(options).middles(options.validation_timesteps).float()
        self._set, self._options = training_set, options
        self._in_channels, self._device = in_channels, device

    def run(self, predict: Callable[[ModelInputs], Tensor]) -> ValidationResult:
        """Measure the loss of `predict`, which gives velocities for inputs of one sample and drops nothing itself.

        Raises:
            UserError: a cache is gone or damaged.
            ValueError: nothing is held out.
        """
        if not self.numbers:
            raise ValueError("Nothing is held out, so there is nothing to validate.")
        began = time.perf_counter()
        losses = torch.zeros(len(self.numbers), len(self.sigmas), dtype=torch.float64)
        with torch.no_grad():
            for row, number in enumerate(self.numbers):
                for column, inputs in enumerate(self.inputs(number)):
                    losses[row, column] = float(flow_loss(predict(inputs), inputs)[1])
        by_sigma = list(zip(self.sigmas.tolist(), losses.mean(0).tolist(), strict=True))
        return ValidationResult(float(losses.mean()), by_sigma, len(self.numbers), time.perf_counter() - began)

    def inputs(self, number: int) -> list[ModelInputs]:
        """The inputs of the item with this number, one for each noise level, with batches of one sample."""
        batch = self._set.read([number])
        generator = torch.Generator().manual_seed(seed_of("validation", batch.names[0]))
        noise = torch.randn(latent_shape(batch), generator=generator)
        one = torch.ones(1)
        given = given_frames(batch, self._options, one.bool())
        return [
            assemble(batch, noise, sigma[None], given, one, self._in_channels).to(self._device) for sigma in self.sigmas
        ]
