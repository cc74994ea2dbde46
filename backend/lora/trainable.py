"""A LoRA that is trained: branches with float32 parameters in the very layers that sampling uses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.lora.formats import LoraWeights, listing, read_lora
from backend.lora.modules import Dropouts, LoraBranch, LoraLinear
from backend.lora.network import check_strength
from backend.lora.patterns import select_layers
from backend.lora.targets import Target, linear_targets, resolve_layers

FIELD = "network_weights"
_ALPHA_ROUNDING = 1e-6


class NormReport(NamedTuple):
    """What `scale_norms` did: how many layers it scaled down; mean and largest norm of all layers afterwards."""

    scaled: int
    mean: float
    largest: float


class WarmStart(NamedTuple):
    """A LoRA file to start from: its rank and alpha, and its pairs by the names that the file has for them."""

    rank: int
    alpha: float
    layers: dict[str, LoraWeights]


def warm_start(path: str | Path, *, field: str = FIELD) -> WarmStart:
    """Read the LoRA that training starts from; its rank and alpha are what --dim_from_weights takes.

    Raises:
        UserError: at `field`: not a LoRA (LoHa, LoKr and others are named), damaged, or layers of several ranks or
            alphas, which training does not have.
    """
    try:
        file = read_lora(path)
    except UserError as error:
        raise UserError(error.message, field) from error
    kinds = Counter((weights.rank, weights.alpha) for weights in file.layers.values())
    (rank, alpha), _ = kinds.most_common(1)[0]
    if len(kinds) > 1:
        odd = [
            f"{stem}: rank {weights.rank}, alpha {weights.alpha:g}"
            for stem, weights in file.layers.items()
            if (weights.rank, weights.alpha) != (rank, alpha)
        ]
        raise UserError(
            f"{file.path} has layers of different rank or alpha: most have rank {rank} and alpha {alpha:g}, {len(odd)} "
            f"have not. Resize it to one rank first (python -m backend.lora_tool):{listing(odd)}",
            field,
        )
    return WarmStart(rank, alpha, file.layers)


class TrainableLora:
    """Low-rank pairs beside the frozen linear layers of a model.

    Parameters are float32 and are computed with in the number format of the activations, so bfloat16, 8-bit and swapped
    base layers work as they are. The base is frozen by attaching; strength 0 gives the base's output bit for bit.
    """

    def __init__(self, targets: Mapping[str, Target], branches: Mapping[str, LoraBranch]) -> None:
        self._targets = dict(targets)
        self._branches = dict(branches)
        self._strength = 1.0

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        rank: int,
        alpha: float | None,
        *,
        seed: int,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> TrainableLora:
        """Freeze `model` and put a new LoRA beside its layers; dropouts are off until `training(True)`.

        down is drawn by kaiming_uniform(a = sqrt 5), that is uniform in +-1 / sqrt(in_features), from a CPU generator
        of `seed`; up is zero, so that nothing changes until the first step. Attach after the model has its device,
        number format, 8-bit weights and swapped layers.

        Args:
            alpha: the effect is alpha / rank; None or 0 means the rank.
            dropout, rank_dropout, module_dropout: see `Dropouts`.
            include, exclude: see `select_layers`.

        Raises:
            Problems: patterns that are wrong or leave nothing.
        """
        if rank < 1:
            raise ValueError(f"A LoRA's rank is at least 1, not {rank}.")
        everything = linear_targets(model)
        targets = {name: everything[name] for name in select_layers(everything, include, exclude)}
        dropouts = Dropouts(dropout or 0.0, rank_dropout or 0.0, module_dropout or 0.0)
        generator = torch.Generator().manual_seed(seed)
        model.requires_grad_(False)
        device = getattr(model, "device", None)
        branches = {}
        for name, target in targets.items():
            out_features, in_features = target.shape
            down = torch.empty(rank, in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5.0), generator=generator)
            branch = LoraBranch(
                down.to(device), torch.zeros(out_features, rank, device=device), alpha or float(rank), dropouts=dropouts
            )
            branches[name] = branch.requires_grad_(True).eval()
            layer = target.layer
            if not isinstance(layer, LoraLinear):
                layer = LoraLinear(layer)
                setattr(target.parent, target.attribute, layer)
            layer.branches.append(branch)
        return cls(targets, branches)

    @property
    def rank(self) -> int:
        """Rank of every pair."""
        return self._any().down.shape[0]

    @property
    def alpha(self) -> float:
        """Alpha of every pair, never 0."""
        return self._any().alpha

    @property
    def layers(self) -> tuple[str, ...]:
        """Dotted names of the layers that are trained, in the order of the model."""
        return tuple(self._branches)

    @property
    def strength(self) -> float:
        """Factor of the whole LoRA, 1 while training; 0 is the base bit for bit."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        self._strength = check_strength(strength)
        for branch in self._branches.values():
            branch.strength = self._strength

    def summary(self, verbose: bool = False) -> str:
        """One line for people; with `verbose` the layers' names and sizes follow, one a line."""
        count = sum(parameter.numel() for parameter in self.named_parameters().values())
        line = f"LoRA: rank {self.rank}, alpha {self.alpha:g}, {len(self._branches)} layers, {count:,} parameters"
        if not verbose:
            return line
        sizes = (f"{name}: {target.shape[1]} -> {target.shape[0]}" for name, target in self._targets.items())
        return "\n  ".join((line, *sizes))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """float32 parameters by name, "<layer>.down" [rank, in] and "<layer>.up" [out, rank], in the model's order.

        A parameter has no gradient (None) after a step in which `module_dropout` left its layer out every time.
        """
        return {
            f"{name}.{half}": getattr(branch, half)
            for name, branch in self._branches.items()
            for half in ("down", "up")
        }

    def param_groups(self, learning_rate: float, loraplus_lr_ratio: float | None = None) -> list[dict[str, Any]]:
        """Groups for an optimizer: one; with a ratio (LoRA+) two, all down and then all up at learning_rate * ratio."""
        if loraplus_lr_ratio is None or loraplus_lr_ratio == 1.0:
            return [{"params": list(self.named_parameters().values()), "lr": learning_rate}]
        branches = self._branches.values()
        return [
            {"params": [branch.down for branch in branches], "lr": learning_rate},
            {"params": [branch.up for branch in branches], "lr": learning_rate * loraplus_lr_ratio},
        ]

    def weights(self) -> dict[str, LoraWeights]:
        """The pairs as they are now, copied to CPU memory, by dotted name; what `write_lora` takes."""
        return {
            name: LoraWeights(_copy(branch.down), _copy(branch.up), branch.alpha)
            for name, branch in self._branches.items()
        }

    def load(self, layers: Mapping[str, LoraWeights], *, source: str | Path = "The LoRA", field: str = FIELD) -> None:
        """Take over all pairs of `layers`, named as the model or any LoRA file names them; nothing changes on an error.

        Args:
            source: what the pairs come from, for messages.
            field: the option that they come from.

        Raises:
            UserError: not exactly the layers that are trained here, another rank, another alpha, or wrong shapes.
        """
        try:
            found = resolve_layers(str(source), layers, self._targets)
        except UserError as error:
            raise UserError(
                f"{error.message}\nLayers that are trained here: {len(self._branches)}; include_patterns and "
                "exclude_patterns in --network_args choose them.",
                field,
            ) from error
        missing = [name for name in self._branches if name not in found]
        if missing:
            raise UserError(
                f"{source} has no weights for {len(missing)} of the {len(self._branches)} layers that are trained. "
                f"Restrict these with include_patterns in --network_args, or use another LoRA:{listing(missing)}",
                field,
            )
        self._refuse_other_scale(str(source), found, field)
        with torch.no_grad():
            for name, weights in found.items():
                self._branches[name].down.copy_(weights.down)
                self._branches[name].up.copy_(weights.up)

    def scale_norms(self, limit: float) -> NormReport:
        """Scale down every layer whose difference alpha / rank * up @ down has a Frobenius norm above `limit`.

        As kohya's scale_weight_norms: both halves take the root of limit / norm. The norm comes from the two small
        Gram matrices, since |U D|^2 = sum of (U^T U) * (D D^T), without ever making the product.
        """
        scale = self.alpha / self.rank
        with torch.no_grad():
            norms = torch.stack([_product_norm(branch.up, branch.down) * scale for branch in self._branches.values()])
            over = norms > limit
            factors = torch.where(over, (limit / norms).sqrt(), torch.ones_like(norms))
            for branch, factor in zip(self._branches.values(), factors.float(), strict=True):
                branch.down.mul_(factor)
                branch.up.mul_(factor)
            after = norms * factors.square()
        return NormReport(int(over.sum()), float(after.mean()), float(after.max()))

    def training(self, on: bool) -> None:
        """Switch the dropouts; `.train()` and `.eval()` of the model switch them too, as those of any module."""
        for branch in self._branches.values():
            branch.train(on)

    def _any(self) -> LoraBranch:
        return next(iter(self._branches.values()))

    def _refuse_other_scale(self, source: str, found: Mapping[str, LoraWeights], field: str) -> None:
        """Another alpha / rank would change the effect of what is loaded without a word; files round it to float32."""
        for name, weights in found.items():
            if weights.rank != self.rank or not math.isclose(weights.alpha, self.alpha, rel_tol=_ALPHA_ROUNDING):
                raise UserError(
                    f"{source} has rank {weights.rank} and alpha {weights.alpha:g} ({name}), the training rank "
                    f"{self.rank} and alpha {self.alpha:g}. Add --dim_from_weights, or give --network_dim "
                    f"{weights.rank} --network_alpha {weights.alpha:g}.",
                    field,
                )


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def _product_norm(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm of up @ down, in float64 where the device has it."""
    if up.device.type != "mps":
        up, down = up.double(), down.double()
    return ((up.t() @ up) * (down @ down.t())).sum().clamp_min(0.0).sqrt()
