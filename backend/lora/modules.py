"""Low-rank layers beside frozen Linears."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Formats that a Linear computes in; anything else (8-bit codes) is storage that only its own layer understands.
_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Dropouts:
    """What a branch leaves out while it is trained, as shares from 0 to below 1.

    Attributes:
        hidden: of the values of down(x), each by itself.
        rank: of the ranks of each sample, the same ones for all of its tokens.
        module: of the forward passes, in which the branch adds nothing; without any rescaling.

    All draws come from the global random generators: the CPU's for `module`, the device's for the others. Kept values
    are multiplied by 1 / (1 - share), as kohya's networks do.
    """

    hidden: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def skips_module(self) -> bool:
        """Draw whether this forward pass goes without the branch."""
        return self.module > 0.0 and torch.rand(()).item() < self.module

    def apply(self, hidden: Tensor) -> Tensor:
        """hidden [samples, ..., rank] with values and ranks left out."""
        if self.hidden > 0.0:
            hidden = F.dropout(hidden, self.hidden)
        if self.rank > 0.0:
            shape = (hidden.shape[0], *(1 for _ in hidden.shape[1:-1]), hidden.shape[-1])
            kept = torch.rand(shape, device=hidden.device) >= self.rank
            hidden = hidden * (kept.to(hidden.dtype) / (1.0 - self.rank))
        return hidden


class LoraBranch(nn.Module):
    """One low-rank pair: adds strength * alpha / rank * up(down(x)) to the output of a Linear.

    down: [rank, in_features], up: [out_features, rank], frozen unless training unfreezes them. A strength of 0 means
    that the branch is skipped. `dropouts` act in `.train()` mode only, and not at all where there are none.
    """

    def __init__(
        self, down: Tensor, up: Tensor, alpha: float, strength: float = 1.0, dropouts: Dropouts | None = None
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.alpha = float(alpha)
        self.strength = float(strength)
        self.dropouts = dropouts

    @property
    def scale(self) -> float:
        """strength * alpha / rank."""
        return self.strength * self.alpha / self.down.shape[0]

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """output [..., out_features] plus this branch's part for x [..., in_features], in the output's dtype.

        The sum happens inside the matrix product, which accumulates in float32 for 16-bit formats, so that a small
        difference is rounded once and not twice. The first dimension of x counts samples where dropouts are active.
        """
        dropouts = self.dropouts if self.training else None
        if dropouts is not None and dropouts.skips_module():
            return output
        hidden = F.linear(x, self.down.to(x.dtype)).to(output.dtype)
        if dropouts is not None:
            hidden = dropouts.apply(hidden)
        flat = torch.addmm(
            output.reshape(-1, output.shape[-1]),
            hidden.reshape(-1, hidden.shape[-1]),
            self.up.to(output.dtype).t(),
            alpha=self.scale,
        )
        return flat.reshape(output.shape)


class LoraLinear(nn.Module):
    """A frozen linear layer and the low-rank branches beside it; it stands in the model where the layer stood.

    The layer is only called, its weights are never touched: so it may hold quantised codes, and removing the branches
    gives back exactly what was there.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleList()

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return int(self.base.out_features)  # type: ignore[arg-type]

    def add_branch(
        self, down: Tensor, up: Tensor, alpha: float, strength: float, dtype: torch.dtype | None = None
    ) -> LoraBranch:
        """Add a pair on the layer's device, in the number format of its weight.

        A layer that holds codes instead of a weight takes the pair in `dtype`, or as it is.
        """
        weight = getattr(self.base, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in _COMPUTE_DTYPES:
            dtype = weight.dtype
        device = next(itertools.chain(self.base.parameters(), self.base.buffers())).device
        branch = LoraBranch(
            down.to(device=device, dtype=dtype or down.dtype),
            up.to(device=device, dtype=dtype or up.dtype),
            alpha,
            strength,
        )
        self.branches.append(branch)
        return branch

    def remove_branch(self, branch: LoraBranch) -> None:
        """Take a pair away again; the others keep their order."""
        self.branches = nn.ModuleList(other for other in self.branches if other is not branch)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus every branch whose strength is not 0: [..., in_features] -> [..., out_features]."""
        output = self.base(x)
        for branch in self.branches:
            assert isinstance(branch, LoraBranch)
            if branch.strength != 0.0:
                output = branch.add_to(output, x)
        return output
