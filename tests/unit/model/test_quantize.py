"""Eight-bit weights: bounded errors in every row, the right layers, LoRAs beside codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.model.quantize import FP8_MAX, Fp8Linear, quantise_blocks
from tests.unit.model.helpers import LARGE_HEADS, SMALL_HEADS, build, inputs, relative


def _linear(rows: int = 64, columns: int = 96, bias: bool = True, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        # Rows of very different size: one scale for the whole matrix would lose the small ones.
        linear.weight *= torch.logspace(-6, 3, rows)[:, None]
    return linear


def _dequantised(layer: Fp8Linear) -> torch.Tensor:
    return layer.codes.double() * layer.scale.double()


def test_every_weight_is_within_the_step_of_e4m3() -> None:
    """3 mantissa bits: half a step is 1/16 of a normal value; below 2^-6 of 448-scaled units it is 2^-10."""
    linear = _linear()
    layer = Fp8Linear(linear)
    weight, found = linear.weight.double(), _dequantised(layer)
    limit = torch.maximum(weight.abs() / 16, 2.0**-10 * layer.scale.double())
    assert bool(((found - weight).abs() <= limit * 1.0001).all())
    assert layer.codes.dtype == torch.float8_e4m3fn
    assert bool(torch.isfinite(layer.codes.float()).all())
    assert float(layer.codes.float().abs().amax(dim=1).min()) == float(layer.codes.float().abs().max()) == FP8_MAX


@pytest.mark.parametrize("seed", range(5))
def test_the_relative_error_of_a_layer_is_below_three_percent(seed: int) -> None:
    linear = _linear(seed=seed)
    layer, x = Fp8Linear(linear), torch.randn(7, 96, generator=torch.Generator().manual_seed(seed))
    weight = linear.weight.detach().double()
    errors = (_dequantised(layer) - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(errors.square().mean().sqrt()) < 0.03
    assert float(errors.max()) < 0.04
    expected = nn.functional.linear(x, linear.weight)
    found = layer(x) - linear.bias
    assert relative(found, expected) < 0.04


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_product_with_dequantised_weights(bias: bool, dtype: torch.dtype) -> None:
    linear = _linear(bias=bias).to(dtype)
    layer, x = Fp8Linear(linear), torch.randn(2, 3, 96).to(dtype)
    found = layer(x)
    expected = x.double() @ _dequantised(layer).T
    if bias:
        expected = expected + linear.bias.double()
    assert found.dtype == dtype
    assert found.shape == (2, 3, 64)
    assert relative(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert (layer.in_features, layer.out_features) == (96, 64)


def test_rows_of_zeros_and_extreme_rows_stay_finite() -> None:
    linear = _linear(4, 8, bias=False)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] = 1e-38
        linear.weight[2] = 1e30
        linear.weight[3] = torch.tensor([448.0] * 7 + [464.0])
    layer = Fp8Linear(linear)
    assert bool(torch.isfinite(_dequantised(layer)).all())
    assert not _dequantised(layer)[0].any()
    assert relative(_dequantised(layer)[2:], linear.weight[2:]) < 0.03


@pytest.mark.parametrize("config", [SMALL_HEADS, LARGE_HEADS])
def test_a_quantised_model_stays_close_and_its_islands_untouched(config) -> None:
    """Trap B22: time, modulation, embeddings and output keep their format, with 32-bit scales."""
    model, whole = build(config), build(config)
    count = quantise_blocks(model)
    assert count == 6 * config.num_text_blocks + 10 * config.num_visual_blocks
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    for name, kind in kinds.items():
        inside = "_blocks." in name and "modulation" not in name
        assert (kind == "Fp8Linear") == inside, name
    scales = [module.scale for module in model.modules() if isinstance(module, Fp8Linear)]
    assert {scale.dtype for scale in scales} == {torch.float32}
    arguments = inputs(config, 1, (2, 4, 4), 5, seed=1)
    with torch.no_grad():
        error = relative(model(**arguments), whole(**arguments))
    # Random weights have no redundancy: each of the blocks adds its own three percent.
    assert 1e-4 < error < 0.08


def test_quantised_weights_take_a_quarter_of_float32() -> None:
    model = build(SMALL_HEADS)

    def size() -> int:
        blocks = (model.text_transformer_blocks, model.visual_transformer_blocks)
        layers = [m for part in blocks for m in part.modules() if type(m) in (nn.Linear, Fp8Linear)]
        wanted = [m for m in layers if m.in_features != SMALL_HEADS.time_dim]
        return sum(t.nbytes for m in wanted for t in [*m.parameters(), *m.buffers()] if t.ndim == 2)

    before = size()
    quantise_blocks(model)
    assert 0.25 * before < size() < 0.28 * before


def test_quantised_models_move_and_cast_without_losing_their_codes() -> None:
    model = build(SMALL_HEADS)
    quantise_blocks(model)
    layer = next(module for module in model.modules() if isinstance(module, Fp8Linear))
    codes = layer.codes.float().clone()
    model.to(torch.device("cpu", 0))
    assert torch.equal(layer.codes.float(), codes)
    assert layer.codes.dtype == torch.float8_e4m3fn
