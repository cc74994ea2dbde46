"""Forward passes that the first process wants and that all must take part in, because each has a share of the weights.

The first process measures and samples as if it were alone; whenever it runs the model, it sends the inputs around
first. The others wait for inputs and run the same forward pass, whose result they throw away. So what is before and
after (encoders, VAE, files, somebody's wish to stop) concerns the first process only, and may fail there as always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from backend.errors import EngineError
from backend.training.processes import Processes
from backend.training.transformer import TrainingTransformer


class SharedForwards:
    """One process leads, the others follow; without a split model leading is nothing, and nobody need follow."""

    def __init__(self, processes: Processes, transformer: TrainingTransformer) -> None:
        self._processes = processes
        self._transformer = transformer
        self._failure: BaseException | None = None

    @contextmanager
    def leading(self, phase: str) -> Iterator[None]:
        """For the first process: inside, forward passes without gradients are run by all.

        Raises:
            EngineError: at `phase`; a forward pass failed here and somebody let it pass, as one lets pass a sample that
                fails. The others are in the middle of it then, so there is no going on together.
        """
        if not self._processes.sharded:
            yield
            return
        self._failure = None
        self._transformer.around = self._announced
        try:
            yield
        finally:
            self._transformer.around = None
            if self._failure is None:
                self._processes.send(None)
        if self._failure is not None:
            raise EngineError(
                f"The model is split over {self._processes.count} processes, and a forward pass failed in one of them "
                f"({self._failure}). The others cannot go on without it, so the training ends.",
                phase,
            ) from self._failure

    def follow(self) -> None:
        """For the others: take part until the first process is done."""
        with torch.no_grad(), self._transformer.evaluating():
            while (inputs := self._processes.receive()) is not None:
                hidden, text, pooled, timesteps, mask = inputs
                assert hidden is not None
                assert text is not None
                assert pooled is not None
                assert timesteps is not None
                self._transformer.velocity(hidden, text, pooled, timesteps, text_mask=mask)

    @contextmanager
    def _announced(self, inputs: Sequence[Tensor | None]) -> Iterator[None]:
        if self._failure is not None:
            raise EngineError("The processes have lost each other in an earlier forward pass.", "train")
        try:
            self._processes.send(inputs)
            yield
        except BaseException as error:
            self._failure = error
            raise
