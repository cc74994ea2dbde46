"""NABLA: order of tokens, window and chosen blocks against diffusers and slow loops; sparse attention against dense."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from backend.errors import UserError
from backend.model.nabla import (
    BLOCK_TOKENS,
    NablaConfig,
    block_sparse_attention,
    check_nabla_size,
    fractal_flatten,
    fractal_unflatten,
    nabla_attention,
    nabla_mask,
    sta_mask,
)
from backend.model.rope import visual_table
from tests.unit.model.helpers import SMALL_HEADS, build, inputs, relative


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _clustered(*shape: int, seed: int) -> torch.Tensor:
    """Tokens whose blocks differ, so that attention between blocks is uneven as in a real model."""
    batch, heads, tokens, width = shape
    centres = _random(batch, heads, tokens // BLOCK_TOKENS, 1, width, seed=seed + 1).repeat(1, 1, 1, BLOCK_TOKENS, 1)
    return _random(*shape, seed=seed) + 1.5 * centres.reshape(shape)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    whole = mask.repeat_interleave(BLOCK_TOKENS, -1).repeat_interleave(BLOCK_TOKENS, -2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=whole)


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 16, 24), (2, 24, 8)])
def test_fractal_order(grid: tuple[int, int, int]) -> None:
    """Frame, block row, block column, then row and column inside the block; the inverse restores everything."""
    from diffusers.models.transformers.transformer_kandinsky import fractal_flatten as theirs

    frames, height, width = grid
    tokens = _random(2, *grid, 3, seed=1)
    flat = fractal_flatten(tokens)
    order = [
        (t, 8 * row + y, 8 * column + x)
        for t in range(frames)
        for row in range(height // 8)
        for column in range(width // 8)
        for y in range(8)
        for x in range(8)
    ]
    expected = torch.stack([tokens[:, t, y, x] for t, y, x in order], dim=1)
    assert torch.equal(flat, expected)
    assert torch.equal(fractal_unflatten(flat, grid), tokens)
    rope = tokens[..., None, None]
    assert torch.equal(flat, theirs(tokens, rope, (2, *grid), block_mask=True)[0])


def test_rotary_table_follows_the_fractal_order() -> None:
    """Positions travel with their tokens."""
    grid, axes, scale = (2, 16, 8), (16, 24, 24), (1.0, 2.0, 2.0)
    rows, fractal = (visual_table(grid, axes, scale, fractal=flag) for flag in (False, True))
    for plain, reordered in zip(rows, fractal, strict=True):
        assert torch.equal(fractal_flatten(plain[:, 0].unflatten(0, grid)[None])[0], reordered[:, 0])


@pytest.mark.parametrize("blocks", [(1, 1, 1), (5, 2, 3), (13, 2, 2), (3, 7, 2)])
@pytest.mark.parametrize("windows", [(11, 3, 3), (1, 1, 1), (3, 5, 2)])
def test_window_equals_diffusers_and_a_loop(blocks: tuple[int, int, int], windows: tuple[int, int, int]) -> None:
    """Bit for bit."""
    from diffusers import Kandinsky5T2VPipeline

    found = sta_mask(blocks, NablaConfig(0.9, *windows))
    assert torch.equal(found, Kandinsky5T2VPipeline.fast_sta_nabla(*blocks, *windows, device="cpu"))
    places = [(t, h, w) for t in range(blocks[0]) for h in range(blocks[1]) for w in range(blocks[2])]
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            near = all(abs(a - b) <= size // 2 for a, b, size in zip(here, there, windows, strict=True))
            assert bool(found[i, j]) == near


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (3, 2, 2), (4, 3, 2)])
def test_chosen_blocks_equal_diffusers(share: float, blocks: tuple[int, int, int]) -> None:
    """Bit for bit the block lists of diffusers' function, with several heads and samples."""
    from diffusers.models.transformers.transformer_kandinsky import nablaT_v2

    config, count = NablaConfig(share, 3, 1, 1), math.prod(blocks)
    query, key = (_clustered(2, 3, count * BLOCK_TOKENS, 16, seed=seed) for seed in (2, 3))
    window = sta_mask(blocks, config)
    theirs = nablaT_v2(query.transpose(1, 2), key.transpose(1, 2), window, thr=share)
    expected = torch.zeros(2, 3, count, count, dtype=torch.bool)
    numbers, indices = theirs.full_kv_num_blocks, theirs.full_kv_indices
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(count)).tolist():
        expected[tuple(place)][indices[tuple(place)][: numbers[tuple(place)]].long()] = True
    assert torch.equal(nabla_mask(query, key, config, window), expected)
    assert torch.equal(nabla_mask(query, key, config, window, budget=1), expected)


@pytest.mark.parametrize("method", ["topcdf", "topk"])
@pytest.mark.parametrize("add_sta", [True, False])
def test_chosen_blocks_equal_a_slow_loop(method: str, add_sta: bool) -> None:
    """An independent implementation of both methods in float64, with and without the window."""
    config, blocks = NablaConfig(0.6, 1, 1, 1, method, add_sta), (3, 2, 2)
    count = math.prod(blocks)
    query, key = (_clustered(1, 2, count * BLOCK_TOKENS, 16, seed=seed) for seed in (4, 5))
    window = sta_mask(blocks, config)
    found = nabla_mask(query, key, config, window)
    for head in range(2):
        means = [part[0, head].double().unflatten(0, (count, 64)).mean(1) for part in (query, key)]
        for row in range(count):
            scores = torch.softmax(means[1] @ means[0][row] / 4, dim=0).tolist()
            largest = sorted(range(count), key=lambda index: -scores[index])
            kept, mass = set(), 0.0
            for index in largest:
                if (mass >= 0.6) if method == "topcdf" else (len(kept) >= round(0.6 * count)):
                    break
                kept.add(index)
                mass += scores[index]
            if add_sta:
                kept |= {index for index in range(count) if window[row, index]}
            assert set(found[0, head, row].nonzero().flatten().tolist()) == kept


def test_at_least_one_block_is_kept() -> None:
    """A tiny share without the window must not leave a row without keys, which would be NaN."""
    query = torch.zeros(1, 1, 3 * BLOCK_TOKENS, 8)
    for method in ("topcdf", "topk"):
        config = NablaConfig(1e-9, method=method, add_sta=False)
        assert nabla_mask(query, query, config, torch.zeros(3, 3, dtype=torch.bool)).any(-1).all()


@pytest.mark.parametrize("budget", [1, 300_000, 1 << 30], ids=["one row", "some rows", "all rows"])
def test_sparse_equals_masked_dense(budget: int) -> None:
    """Traps B15 and fact 7: the block mask is obeyed, forward and backward, however the work is split."""
    count = 9
    tensors = [_random(2, 2, count * BLOCK_TOKENS, 16, seed=seed).requires_grad_() for seed in (6, 7, 8)]
    mask = _random(2, 2, count, count, seed=9) > 0.6
    mask |= torch.eye(count, dtype=torch.bool)
    outer = _random(2, 2, count * BLOCK_TOKENS, 16, seed=10)
    expected = _dense(*tensors, mask)
    found = block_sparse_attention(*tensors, mask, budget=budget)
    assert (found - expected).abs().max() < 1e-6
    full = F.scaled_dot_product_attention(*tensors)
    assert (found - full).abs().max() > 1e-2
    wanted = torch.autograd.grad(expected, tensors, outer)
    for ours, theirs in zip(torch.autograd.grad(found, tensors, outer), wanted, strict=True):
        assert relative(ours, theirs) < 1e-6


def test_sparse_attention_reads_only_kept_blocks() -> None:
    """Poison in every block that is not kept stays there: the work is sparse, not masked after the fact."""
    query, key, value = (_random(1, 1, 4 * BLOCK_TOKENS, 8, seed=seed) for seed in (11, 12, 13))
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1] = True
    expected = block_sparse_attention(query, key, value, mask)
    for block in (0, 2, 3):
        key[:, :, block * 64 : block * 64 + 64] = value[:, :, block * 64 : block * 64 + 64] = float("nan")
    assert torch.equal(block_sparse_attention(query, key, value, mask), expected)


def test_temporary_memory_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values gathered at once never exceed the budget while one row fits it."""
    from backend.model import nabla

    gathered: list[int] = []
    original = nabla._attend

    def watching(queries, keys, values, valid):
        gathered.append(keys.numel() * 4 + values.numel() * 4)
        return original(queries, keys, values, valid)

    monkeypatch.setattr(nabla, "_attend", watching)
    count, budget = 12, 200_000
    tensors = [_random(1, 4, count * BLOCK_TOKENS, 16, seed=seed) for seed in (14, 15, 16)]
    mask = (_random(1, 4, count, count, seed=17) > 0.3) | torch.eye(count, dtype=torch.bool)
    block_sparse_attention(*tensors, mask, budget=budget)
    assert max(gathered) <= budget
    assert len(gathered) < 4 * count


def test_whole_attention_in_bfloat16() -> None:
    """The layout of the model, and bfloat16 near float32 when the same blocks are chosen."""
    config, blocks = NablaConfig(1.0), (2, 1, 2)
    query, key, value = (_random(1, 4 * BLOCK_TOKENS, 2, 32, seed=seed) for seed in (18, 19, 20))
    window = sta_mask(blocks, config)
    expected = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)
    assert relative(nabla_attention(query, key, value, config, window), expected) < 1e-6
    half = nabla_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), config, window)
    assert half.dtype == torch.bfloat16
    assert relative(half, expected) < 1e-2


def test_model_with_everything_kept_equals_dense() -> None:
    """P = 1 keeps every block, so the fractal order must change nothing; a small P changes the result."""
    model, arguments = build(SMALL_HEADS), inputs(SMALL_HEADS, 2, (3, 16, 32), 6, seed=21)
    with torch.no_grad():
        dense = model(**arguments)
        assert relative(model(**arguments, nabla=NablaConfig(1.0)), dense) < 1e-5
        sparse = model(**arguments, nabla=NablaConfig(0.2, 1, 1, 1))
    assert relative(sparse, dense) > 1e-3


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        ((480, 832), r"832 x 480 is not.*768 x 384 or 896 x 512"),
        ((512, 720), r"720 x 512 is not.*640 x 512 or 768 x 512"),
        ((64, 64), r"64 x 64 is not.*are 128 x 128\."),
    ],
)
def test_sizes_that_form_no_blocks_are_refused(pixels: tuple[int, int], words: str) -> None:
    """The sentence names the nearest sizes that work."""
    with pytest.raises(UserError, match=words):
        check_nabla_size(pixels[0] // 8, pixels[1] // 8)
    check_nabla_size(512 // 8, 768 // 8)
    model = build(SMALL_HEADS)
    with pytest.raises(UserError, match="multiples of 128"):
        model(**inputs(SMALL_HEADS, 1, (1, 8, 8), 3, seed=22), nabla=NablaConfig(0.9))


def test_settings_out_of_range_are_refused() -> None:
    """Each with its field."""
    for settings, field in (
        ({"P": 0.0}, "nabla_P"),
        ({"P": 1.1}, "nabla_P"),
        ({"P": 0.5, "method": "best"}, "nabla_method"),
        ({"P": 0.5, "wH": 0}, "nabla_wH"),
    ):
        with pytest.raises(UserError) as caught:
            NablaConfig(**settings)
        assert caught.value.field == field
