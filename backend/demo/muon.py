"""Muon for weight matrices, Adam for everything else: trains tiny models in few steps on a CPU.

Muon keeps a momentum of the gradients and applies its nearest semi-orthogonal matrix, found by Newton-Schulz steps.
"""

from collections.abc import Iterable

import torch
from torch import nn

# Coefficients of the quintic iteration: they push all singular values of a matrix of norm 1 close to 1 in few steps.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, iterations: int = 4) -> torch.Tensor:
    """Roughly the nearest semi-orthogonal matrix of `matrix`, flattened to [rows, everything else]; same shape back."""
    a, b, c = _NEWTON_SCHULZ
    flat = matrix.flatten(1)
    tall = flat.shape[0] > flat.shape[1]
    if tall:
        flat = flat.T
    flat = flat / (flat.norm() + 1e-7)
    for _ in range(iterations):
        gram = flat @ flat.T
        flat = a * flat + (b * gram + c * gram @ gram) @ flat
    return (flat.T if tall else flat).reshape(matrix.shape)


class Muon(torch.optim.Optimizer):
    """Muon for `matrices` (2 or more dimensions), Adam for `others`; `matrix_rms` sets the size of a Muon update.

    matrix_rms "fan": 0.2 * sqrt(longer side), the size that matches Adam's updates (for transformers);
    "fixed": 8.3 * sqrt(max(1, rows / columns)), the same relative change for every kernel (for convolutions).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        matrix_rate: float,
        other_rate: float,
        matrix_rms: str = "fan",
    ) -> None:
        groups = [
            {"params": list(matrices), "muon": True, "lr": matrix_rate, "rate": matrix_rate},
            {"params": list(others), "muon": False, "lr": other_rate, "rate": other_rate},
        ]
        self.matrix_rms = matrix_rms
        super().__init__(groups, {"momentum": 0.95, "betas": (0.9, 0.98)})

    def scale(self, factor: float) -> None:
        """Set the learning rates to `factor` times their base rates."""
        for group in self.param_groups:
            group["lr"] = group["rate"] * factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                (self._muon if group["muon"] else self._adam)(weight, weight.grad, group)

    def _muon(self, weight: nn.Parameter, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight)
        mean = state["mean"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalize(gradient.lerp(mean, group["momentum"]))
        rows, columns = weight.shape[0], weight[0].numel()
        size = 8.3 * max(1.0, rows / columns) ** 0.5 if self.matrix_rms == "fixed" else 0.2 * max(rows, columns) ** 0.5
        weight.add_(update, alpha=-group["lr"] * size)

    def _adam(self, weight: nn.Parameter, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state.update(mean=torch.zeros_like(weight), square=torch.zeros_like(weight), steps=0)
        first, second = group["betas"]
        state["steps"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean = state["mean"] / (1 - first ** state["steps"])
        deviation = (state["square"] / (1 - second ** state["steps"])).sqrt() + 1e-8
        weight.addcdiv_(mean, deviation, value=-group["lr"])
