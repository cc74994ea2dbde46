"""Which noise levels are trained how often: distributions of sigma (0 clean, 1 noise), strata, weights of the loss.

Every distribution is given by its quantile function Q: sigma = Q(u) with u uniform in 0..1. Limits, strata and the
noise levels of the validation all use the same Q. Everything is float64.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backend.errors import UserError
from backend.training.draws import generator

if TYPE_CHECKING:
    from backend.config.train_steps import TrainStepsOptions

MODEL_TIME = 1000.0
"""Time of the model at sigma 1. In training it is 1000 * sigma as in generation, not one more (B18)."""
SMALLEST_WEIGHTED_SIGMA = 0.01
"""sigma^-2 grows without bounds; below this sigma it stays at 10,000, or single clean samples would outweigh all."""

_MARGIN = 2.0**-53
_SMALLEST_SHARE = 1e-6
_HALVINGS = 60


@dataclass(frozen=True)
class TimestepDistribution:
    """One distribution of sigma with its limits.

    Attributes:
        mode: with n normal, u uniform and the logistic function s: uniform u; sigmoid s(k n); shift
            f v / (1 + (f - 1) v) with v = s(k n); logsnr s(-l / 2) with l = mean + std n; logit_normal
            s(mean + std n); mode 1 - u - m (cos^2(pi u / 2) - 1 + u), from Stable Diffusion 3.
        shift, sigmoid_scale, logit_mean, logit_std, mode_scale: f, k, mean, std, m.
        lowest, highest: sigmas that are trained at all.
        preserve: within the limits keep the shape, as if draws outside were drawn again; else squeeze it into them.
    """

    mode: str
    shift: float = 5.0
    sigmoid_scale: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    lowest: float = 0.0
    highest: float = 1.0
    preserve: bool = False

    @classmethod
    def from_options(cls, options: TrainStepsOptions) -> TimestepDistribution:
        """The distribution that the options mean.

        Raises:
            UserError: the limits are in the wrong order, or hold next to nothing of a distribution whose shape is kept.
        """
        lowest = (options.min_timestep or 0.0) / MODEL_TIME
        highest = (MODEL_TIME if options.max_timestep is None else options.max_timestep) / MODEL_TIME
        if lowest >= highest:
            raise UserError(
                f"must be above --min_timestep, which is {lowest * MODEL_TIME:g}. Raise it, or lower the other.",
                "max_timestep",
            )
        made = cls(
            options.timestep_sampling,
            options.discrete_flow_shift,
            options.sigmoid_scale,
            options.logit_mean,
            options.logit_std,
            options.mode_scale,
            lowest,
            highest,
            options.preserve_distribution_shape,
        )
        low, high = made._kept_shares
        if made.preserve and high - low < _SMALLEST_SHARE:
            raise UserError(
                f"{options.timestep_sampling} has next to nothing between {lowest * MODEL_TIME:g} and "
                f"{highest * MODEL_TIME:g}. Widen the limits, or squeeze the distribution into them instead.",
                "preserve_distribution_shape",
            )
        return made

    def quantile(self, shares: Tensor) -> Tensor:
        """Q: float64 sigmas below which these shares (0..1) of all draws lie; a rising function."""
        shares = shares.double()
        if self.preserve:
            low, high = self._kept_shares
            sigmas = self._whole_quantile(low + (high - low) * shares)
        else:
            sigmas = self.lowest + (self.highest - self.lowest) * self._whole_quantile(shares)
        return sigmas.clamp(self.lowest, self.highest)

    def cumulative(self, sigmas: Tensor) -> Tensor:
        """The inverse of Q: float64 shares of all draws that lie below these sigmas."""
        sigmas = sigmas.double().clamp(self.lowest, self.highest)
        if self.preserve:
            low, high = self._kept_shares
            return ((self._whole_cumulative(sigmas) - low) / (high - low)).clamp(0, 1)
        return self._whole_cumulative((sigmas - self.lowest) / (self.highest - self.lowest))

    def middles(self, count: int) -> Tensor:
        """The sigmas in the middles of `count` equal shares of the distribution, float64, rising."""
        return self.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count)

    @functools.cached_property
    def _kept_shares(self) -> tuple[float, float]:
        low, high = self._whole_cumulative(torch.tensor([self.lowest, self.highest], dtype=torch.float64)).tolist()
        return low, high

    def _whole_quantile(self, shares: Tensor) -> Tensor:
        """Q without limits."""
        shares = shares.clamp(_MARGIN, 1 - _MARGIN)
        if self.mode == "uniform":
            return shares
        if self.mode == "mode":
            # The published function falls from 1 to 0.
            flipped = 1 - shares
            return 1 - flipped - self.mode_scale * (torch.cos(math.pi / 2 * flipped) ** 2 - 1 + flipped)
        normal = torch.special.ndtri(shares)
        if self.mode == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * normal)
        if self.mode == "logsnr":
            # A high signal-to-noise ratio is a low sigma, so the smallest sigmas have the largest normals.
            return torch.sigmoid((self.logit_std * normal - self.logit_mean) / 2)
        sigmas = torch.sigmoid(self.sigmoid_scale * normal)
        return sigmas if self.mode == "sigmoid" else self.shift * sigmas / (1 + (self.shift - 1) * sigmas)

    def _whole_cumulative(self, sigmas: Tensor) -> Tensor:
        """The inverse of Q without limits."""
        if self.mode == "uniform":
            return sigmas
        if self.mode == "mode":
            return self._halve(sigmas)
        if self.mode == "shift":
            sigmas = sigmas / (self.shift - (self.shift - 1) * sigmas)
        logits = torch.logit(sigmas)
        if self.mode == "logit_normal":
            return torch.special.ndtr((logits - self.logit_mean) / self.logit_std)
        if self.mode == "logsnr":
            return torch.special.ndtr((2 * logits + self.logit_mean) / self.logit_std)
        return torch.special.ndtr(logits / self.sigmoid_scale)

    def _halve(self, sigmas: Tensor) -> Tensor:
        """Invert Q by halving, where no formula does."""
        low, high = torch.zeros_like(sigmas), torch.ones_like(sigmas)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = self._whole_quantile(middle) < sigmas
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(sigmas <= 0, 0.0, torch.where(sigmas >= 1, 1.0, (low + high) / 2))


def draw_sigmas(
    options: TrainStepsOptions, count: int, seed: int, epoch: int, batch: int, first_slot: int = 0
) -> Tensor:
    """The sigmas of the `count` samples of a batch, float32 [count].

    With `--num_timestep_buckets n` each run of n samples of an epoch (`first_slot`: the number of its samples before
    this batch) takes every n-th part of the distribution once, in a shuffled order that depends on seed and epoch only.

    Raises:
        UserError: as `TimestepDistribution.from_options`.
    """
    shares = torch.rand(count, dtype=torch.float64, generator=generator(seed, epoch, batch, "timesteps"))
    buckets = options.num_timestep_buckets
    if buckets is not None:
        places = [divmod(slot, buckets) for slot in range(first_slot, first_slot + count)]
        strata = torch.stack([_shuffled_strata(seed, epoch, turn, buckets)[place] for turn, place in places])
        shares = (strata + shares) / buckets
    return TimestepDistribution.from_options(options).quantile(shares).float()


@functools.lru_cache(maxsize=8)
def _shuffled_strata(seed: int, epoch: int, turn: int, buckets: int) -> Tensor:
    return torch.randperm(buckets, generator=generator(seed, epoch, turn, "strata"))


def loss_weights(sigmas: Tensor, scheme: str) -> Tensor:
    """Weights of the loss by sigma, float32 [B].

    none 1; sigma_sqrt sigma^-2, with sigma at least `SMALLEST_WEIGHTED_SIGMA`; cosmap 2 / (pi (1 - 2 s + 2 s^2)).
    """
    sigmas = sigmas.double()
    if scheme == "sigma_sqrt":
        return sigmas.clamp(min=SMALLEST_WEIGHTED_SIGMA).pow(-2).float()
    if scheme == "cosmap":
        return (2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))).float()
    return torch.ones_like(sigmas).float()
