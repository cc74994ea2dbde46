"""Frozen Linears in training: exact gradients, and no copy of a weight between forward and backward.

`cpu:0` stands for the device: torch copies when it moves a tensor of `cpu` there, as it does for a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.errors import UserError
from backend.model.checkpointing import checkpoint_blocks
from backend.model.dit import Kandinsky5Transformer
from backend.model.frozen import frozen_linear
from backend.model.offload import SwappedLinear, swap_layers
from backend.model.quantize import Fp8Linear, dequantise, quantise_blocks
from tests.unit.model.helpers import LARGE_HEADS, build, inputs
from tests.unit.model.trained import add_lora, gradients, same, switch_dropout, watching

DEVICE = torch.device("cpu", 0)
ARGUMENTS: dict[str, Any] = inputs(LARGE_HEADS, 2, (2, 4, 4), 5, seed=2)
DTYPES = [torch.float32, torch.bfloat16]


def _linear(bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(96, 64, bias=bias).to(dtype).requires_grad_(False)


def _input_gradient(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, gradient of the input, and what autograd saved."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 7, 96, generator=generator).to(dtype).requires_grad_()
    outer = torch.randn(2, 7, 64, generator=generator).to(dtype)
    saved: list[Tensor] = []
    with watching(saved.append):
        output = layer(x)
    output.backward(outer)
    assert x.grad is not None
    return output.detach(), x.grad, saved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bit_layers_have_the_gradient_of_their_dequantised_weight(bias: bool, dtype: torch.dtype) -> None:
    linear = _linear(bias, dtype)
    layer = Fp8Linear(linear)
    plain = _linear(bias, dtype)
    plain.weight.copy_(dequantise(layer.codes, layer.scale, dtype))
    expected_output, expected, kept_by_plain = _input_gradient(plain, dtype)
    output, gradient, kept = _input_gradient(layer, dtype)
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected)
    assert [tensor.numel() for tensor in kept_by_plain] == [96 * 64]
    assert kept == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantised", [True, False])
def test_a_swapped_layer_fetches_its_weight_forward_and_backward_and_keeps_none(
    quantised: bool, dtype: torch.dtype
) -> None:
    linear = _linear(True, dtype)
    base = Fp8Linear(linear) if quantised else linear
    expected_output, expected, _ = _input_gradient(base, dtype)
    fetched: list[Tensor] = []
    layer = SwappedLinear(base, torch.device("cpu"), lambda master: _fetched(fetched, master))
    output, gradient, kept = _input_gradient(layer, dtype)
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected)
    assert kept == []
    parts = [(64, 96), (64, 1)] if quantised else [(64, 96)]
    assert [tuple(tensor.shape) for tensor in fetched] == parts * 2
    assert (layer.in_features, layer.out_features) == (96, 64)


def _fetched(seen: list[Tensor], master: Tensor) -> Tensor:
    seen.append(master)
    return master.clone()


def test_the_inputs_are_not_kept_by_the_source_of_the_weight() -> None:
    """Trap: a closure over the inputs would keep them as surely as autograd does."""
    layer = Fp8Linear(_linear(True, torch.float32))
    hidden = torch.randn(4, 96, requires_grad=True) * 1
    storage = torch.multiprocessing.reductions.StorageWeakRef(hidden.untyped_storage())
    output = layer(hidden)
    del hidden
    assert storage.expired()
    output.sum().backward()


def test_double_precision_agrees_with_finite_differences() -> None:
    weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: frozen_linear(value, lambda: weight, bias), (x,))


# --- in the model -------------------------------------------------------------------------------------------------


def _model(*, quantised: bool = False, swap: int = 0, seen: list[Tensor] | None = None) -> Kandinsky5Transformer:
    model = build(LARGE_HEADS).requires_grad_(False)
    if quantised:
        quantise_blocks(model)
    if swap:
        swap_layers(model, swap, DEVICE, None if seen is None else lambda master: _fetched(seen, master))
    return model


def _train(model: Kandinsky5Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = add_lora(model)
    switch_dropout(model, True)
    return gradients(model, parameters, ARGUMENTS)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_swapping_changes_no_bit_of_loss_and_gradients(count: int, quantised: bool, checkpointed: bool) -> None:
    """Trap: weights that were released after the forward pass are not there for the backward pass."""
    loss, expected = _train(_model(quantised=quantised))
    model = _model(quantised=quantised, swap=count)
    model.to(DEVICE)
    if checkpointed:
        checkpoint_blocks(model)
    found_loss, found = _train(model)
    assert torch.equal(found_loss, loss)
    assert same(found, expected)


def test_the_order_of_fetches_is_that_of_use_and_backwards_its_reverse() -> None:
    seen: list[Tensor] = []
    model = _model(swap=1, seen=seen)
    names = {m._masters[0].data_ptr(): n for n, m in model.named_modules() if isinstance(m, SwappedLinear)}
    parameters = add_lora(model)
    loss = model(**ARGUMENTS).square().mean()
    forward = [names[master.data_ptr()].partition("visual_transformer_blocks.1.")[2] for master in seen]
    assert forward[0] == "visual_modulation.out_layer"
    heads = ("to_query", "to_key", "to_value", "out_layer")
    assert forward[1:] == [
        *(f"self_attention.{name}" for name in heads),
        *(f"cross_attention.{name}" for name in heads),
        "feed_forward.in_layer",
        "feed_forward.out_layer",
    ]
    seen.clear()
    loss.backward()
    backward = [names[master.data_ptr()].partition("visual_transformer_blocks.1.")[2] for master in seen]
    # The modulation learns nothing and its input has no gradient; cross-attention's three inputs have two sources.
    assert sorted(backward) == sorted(forward[1:])
    assert backward[:3] == ["feed_forward.out_layer", "feed_forward.in_layer", "cross_attention.out_layer"]
    assert set(backward[3:6]) == {"cross_attention.to_query", "cross_attention.to_key", "cross_attention.to_value"}
    assert backward[6] == "self_attention.out_layer"
    assert all(parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("checkpointed", [True, False])
def test_autograd_holds_no_weight_of_a_swapped_or_quantised_block(checkpointed: bool) -> None:
    sizes = {LARGE_HEADS.model_dim**2, LARGE_HEADS.model_dim * LARGE_HEADS.ff_dim}

    def weights_kept(model: Kandinsky5Transformer) -> int:
        add_lora(model)
        if checkpointed:
            checkpoint_blocks(model)
        kept: list[Tensor] = []
        with watching(kept.append):
            output = model(**ARGUMENTS)
        output.mean().backward()
        return sum(tensor.ndim == 2 and tensor.numel() in sizes for tensor in kept)

    linears = 6 * LARGE_HEADS.num_text_blocks + 10 * LARGE_HEADS.num_visual_blocks
    if not checkpointed:
        # Queries, keys and values of the first text block and the first visual one have inputs without a gradient.
        assert weights_kept(_model()) == linears - 6
    assert weights_kept(_model(quantised=True, swap=2)) == 0


def test_moving_the_model_leaves_the_masters_where_they_are() -> None:
    model = _model(swap=2)
    layers = [module for module in model.modules() if isinstance(module, SwappedLinear)]
    assert len(layers) == 2 * 11
    before = [layer._masters[0].data_ptr() for layer in layers]
    biases = [layer.bias.data_ptr() for layer in layers if layer.bias is not None]
    model.to(DEVICE)
    assert [layer._masters[0].data_ptr() for layer in layers] == before
    assert all(a != b.bias.data_ptr() for a, b in zip(biases, [m for m in layers if m.bias is not None], strict=True))
    swapped = [name for name, _ in model.named_parameters() if "visual_transformer_blocks.1." in name]
    assert all(name.endswith(("bias", "norm.weight")) for name in swapped)


def test_a_swapped_model_samples_as_the_whole_one() -> None:
    with torch.no_grad():
        expected = _model()(**ARGUMENTS)
        model = _model(swap=2)
        model.to(DEVICE)
        assert torch.equal(model(**ARGUMENTS), expected)


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(UserError, match="3 blocks cannot be swapped: the model has 2") as caught:
        swap_layers(build(LARGE_HEADS), 3, DEVICE)
    assert caught.value.field == "blocks_to_swap"
