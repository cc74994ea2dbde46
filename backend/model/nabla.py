"""NABLA: self-attention over the blocks of 64 tokens that matter, chosen per head and query block.

A block is an 8 x 8 square of patches of one latent frame; in the fractal order of tokens a block is contiguous. The
masked attention here is exact and truly sparse on every device: kept keys and values are gathered, nothing else is
read, and memory stays within a budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backend.errors import UserError

BLOCK_SIDE = 8
BLOCK_TOKENS = BLOCK_SIDE * BLOCK_SIDE
# Latents are 8 times smaller than pixels and patches hold 2 x 2 latents.
PIXELS_PER_BLOCK = BLOCK_SIDE * 2 * 8
_PIXELS_PER_LATENT = 8
_CPU_BUDGET = 32 << 20
_ACCELERATOR_BUDGET = 256 << 20


@dataclass(frozen=True)
class NablaConfig:
    """Parameters of NABLA.

    P: with method "topcdf" the share of attention mass that the kept blocks hold; with "topk" the share of blocks kept.
    wT, wH, wW: sizes of the window of blocks (frames, rows, columns) that is always kept when add_sta is set.
    """

    P: float
    wT: int = 11  # noqa: N815 (the published names of these settings)
    wH: int = 3  # noqa: N815
    wW: int = 3  # noqa: N815
    method: str = "topcdf"
    add_sta: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.P <= 1:
            raise UserError(f"NABLA's P is {self.P}; it must be above 0 and at most 1.", "nabla_P")
        if self.method not in ("topcdf", "topk"):
            raise UserError(f"{self.method!r} is not a NABLA method. Use topcdf or topk.", "nabla_method")
        for name in ("wT", "wH", "wW"):
            if getattr(self, name) < 1:
                raise UserError(f"NABLA's window {name} must be at least 1.", f"nabla_{name}")


def check_nabla_size(latent_height: int, latent_width: int) -> None:
    """Refuse sizes whose patches do not form whole blocks, naming the nearest ones that do.

    Raises:
        UserError: a side is no multiple of 128 pixels (16 latents).
    """
    height, width = latent_height * _PIXELS_PER_LATENT, latent_width * _PIXELS_PER_LATENT
    if height % PIXELS_PER_BLOCK == 0 and width % PIXELS_PER_BLOCK == 0:
        return
    choices = [
        f"{max(rounding(width / PIXELS_PER_BLOCK), 1) * PIXELS_PER_BLOCK} x "
        f"{max(rounding(height / PIXELS_PER_BLOCK), 1) * PIXELS_PER_BLOCK}"
        for rounding in (math.floor, math.ceil)
    ]
    nearest = " or ".join(dict.fromkeys(choices))
    raise UserError(
        f"NABLA attention needs a width and height that are multiples of {PIXELS_PER_BLOCK} pixels, and "
        f"{width} x {height} is not. The nearest sizes are {nearest}."
    )


def fractal_flatten(grid_tokens: Tensor) -> Tensor:
    """Order tokens [B, T, H, W, ...] block by block: [B, T*H*W, ...]; H and W are multiples of 8."""
    batch, frames, height, width, *rest = grid_tokens.shape
    rows, columns = height // BLOCK_SIDE, width // BLOCK_SIDE
    split = grid_tokens.reshape(batch, frames, rows, BLOCK_SIDE, columns, BLOCK_SIDE, *rest)
    return split.transpose(3, 4).reshape(batch, frames * height * width, *rest)


def fractal_unflatten(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `fractal_flatten`: [B, S, ...] to [B, T, H, W, ...] for grid (T, H, W)."""
    frames, height, width = grid
    batch, _, *rest = tokens.shape
    rows, columns = height // BLOCK_SIDE, width // BLOCK_SIDE
    split = tokens.reshape(batch, frames, rows, columns, BLOCK_SIDE, BLOCK_SIDE, *rest)
    return split.transpose(3, 4).reshape(batch, frames, height, width, *rest)


def sta_mask(blocks: tuple[int, int, int], config: NablaConfig, device: torch.device | str = "cpu") -> Tensor:
    """The sliding window: bool [n, n] over n = T*H*W blocks, True where all three distances are within the windows."""
    axes = []
    for size, window in zip(blocks, (config.wT, config.wH, config.wW), strict=True):
        places = torch.arange(size, device=device)
        axes.append((places[:, None] - places[None, :]).abs() <= window // 2)
    frames, rows, columns = axes
    whole = frames[:, None, None, :, None, None] & rows[:, None, None, :, None] & columns[:, None, None, :]
    count = math.prod(blocks)
    return whole.reshape(count, count)


def memory_budget(device: torch.device) -> int:
    """Bytes of temporary tensors that the functions here allow themselves on `device`."""
    return _CPU_BUDGET if device.type == "cpu" else _ACCELERATOR_BUDGET


@torch.no_grad()
def nabla_mask(query: Tensor, key: Tensor, config: NablaConfig, sta: Tensor, *, budget: int | None = None) -> Tensor:
    """Which key blocks each query block attends to, per head.

    Scores are the softmax of the blocks' mean queries and keys. "topcdf" keeps the largest blocks that hold about P of
    the mass (the block that crosses is kept), "topk" the P * n largest; the window `sta` is added when add_sta is set,
    and at least one block is always kept.

    Shapes: query, key [B, H, S, D] after rotary; sta bool [n, n], n = S / 64. Returns bool [B, H, n, n].
    """
    batch, heads, tokens, width = query.shape
    count = tokens // BLOCK_TOKENS
    means = [
        part.reshape(batch * heads, count, BLOCK_TOKENS, width).mean(-2, dtype=torch.float32) for part in (query, key)
    ]
    mask = torch.empty(batch * heads, count, count, dtype=torch.bool, device=query.device)
    # Scores, sorted values and indices of one head take about 20 bytes an element.
    group = max((budget or memory_budget(query.device)) // (20 * count * count), 1)
    for start in range(0, batch * heads, group):
        queries, keys = (part[start : start + group] for part in means)
        scores = torch.softmax(queries @ keys.transpose(-2, -1) / math.sqrt(width), dim=-1)
        values, order = scores.sort(-1)
        if config.method == "topk":
            kept = torch.arange(count, device=query.device) >= count - max(round(config.P * count), 1)
            kept = kept.expand_as(values).clone()
        else:
            kept = values.cumsum_(-1) >= 1 - config.P
        kept[..., -1] = True
        mask[start : start + group].scatter_(-1, order, kept)
    if config.add_sta:
        mask |= sta
    return mask.view(batch, heads, count, count)


def nabla_attention(query: Tensor, key: Tensor, value: Tensor, config: NablaConfig, sta: Tensor) -> Tensor:
    """NABLA self-attention of tokens in fractal order.

    Shapes: query, key (after rotary), value [B, S, H, D]; sta bool [S/64, S/64]. Returns [B, S, H, D].
    """
    query, key, value = (part.transpose(1, 2).contiguous() for part in (query, key, value))
    mask = nabla_mask(query.detach(), key.detach(), config, sta)
    return block_sparse_attention(query, key, value, mask).transpose(1, 2)


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, budget: int | None = None
) -> Tensor:
    """Exact attention over the kept blocks; equals SDPA with the mask repeated over the 64 x 64 tokens of each block.

    Shapes: query, key, value [B, H, S, D]; mask bool [B, H, S/64, S/64] with at least one True a row. Returns
    [B, H, S, D]. Temporary memory stays within `budget` bytes (or one query block's need, when that is more), in the
    backward pass too, which recomputes what it needs.
    """
    return _BlockSparse.apply(query, key, value, mask, budget or memory_budget(query.device))


class _Group(NamedTuple):
    """Query blocks of similar need: their rows [G], the key blocks of each [G, m], and which of these are padding."""

    rows: Tensor
    blocks: Tensor
    valid: Tensor | None


def _groups(mask: Tensor, row_bytes: int, budget: int) -> Iterator[_Group]:
    """Split all rows (batch, head, query block) into groups whose gathered keys and values fit the budget."""
    count = mask.shape[-1]
    flat = mask.reshape(-1, count)
    needs, order = flat.sum(-1).sort(descending=True, stable=True)
    sizes = needs.tolist()
    start = 0
    while start < len(sizes):
        most = sizes[start]
        end = min(start + max(budget // (most * row_bytes), 1), len(sizes))
        rows = order[start:end]
        blocks = flat[rows].to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :most]
        valid = None
        if sizes[end - 1] != most:
            valid = torch.arange(most, device=mask.device) < needs[start:end, None]
        # Row r belongs to head r // count, whose key blocks begin at that multiple of count.
        yield _Group(rows, blocks + (rows // count * count)[:, None], valid)
        start = end


def _attend(queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
    """SDPA of one group: queries [G, 64, D] against keys, values [G, m * 64, D]."""
    mask = None if valid is None else valid.repeat_interleave(BLOCK_TOKENS, dim=-1)[:, None, None, :]
    heads_first = (part[:, None] for part in (queries, keys, values))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)[:, 0]


def _in_blocks(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, BLOCK_TOKENS, tokens.shape[-1])


def _gather(blocks_of: Tensor, group: _Group) -> Tensor:
    picked = blocks_of.index_select(0, group.blocks.flatten())
    return picked.view(group.rows.numel(), -1, blocks_of.shape[-1])


class _BlockSparse(torch.autograd.Function):
    """Group by group forward and backward; only the inputs and the mask are kept between the two."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, budget: int) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.budget = budget
        queries, keys, values = (_in_blocks(part) for part in (query, key, value))
        result = torch.empty_like(queries)
        row_bytes = 2 * BLOCK_TOKENS * query.shape[-1] * query.element_size()
        for group in _groups(mask, row_bytes, budget):
            attended = _attend(queries[group.rows], _gather(keys, group), _gather(values, group), group.valid)
            result[group.rows] = attended
        return result.view_as(query)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, mask = ctx.saved_tensors
        queries, keys, values = (_in_blocks(part) for part in (query, key, value))
        outer = _in_blocks(gradients[0])
        query_grad = torch.empty_like(queries)
        # Many query blocks add to one key block; float32 keeps that sum exact enough in a bfloat16 model.
        key_grad, value_grad = (torch.zeros_like(part, dtype=torch.float32) for part in (keys, values))
        # The recomputation keeps gathered tensors and their gradients: about three times the forward's need.
        row_bytes = 6 * BLOCK_TOKENS * query.shape[-1] * query.element_size()
        for group in _groups(mask, row_bytes, ctx.budget):
            with torch.enable_grad():
                parts = [queries[group.rows], _gather(keys, group), _gather(values, group)]
                parts = [part.detach().requires_grad_() for part in parts]
                attended = _attend(*parts, group.valid)
            found = torch.autograd.grad(attended, parts, outer[group.rows])
            query_grad[group.rows] = found[0]
            for total, part in zip((key_grad, value_grad), found[1:], strict=True):
                total.index_add_(0, group.blocks.flatten(), _in_blocks(part).float())
        return (
            query_grad.view_as(query),
            key_grad.view_as(key).to(key.dtype),
            value_grad.view_as(value).to(value.dtype),
            None,
            None,
        )
