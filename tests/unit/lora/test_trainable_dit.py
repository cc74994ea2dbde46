"""Training a LoRA in the whole DiT: all gradients, checkpointing with dropouts, learning beside 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from backend.lora.trainable import TrainableLora
from backend.model.checkpointing import HostMemory, checkpoint_blocks
from backend.model.dit import Kandinsky5Transformer
from backend.model.offload import swap_layers
from backend.model.quantize import quantise_blocks
from tests.unit.model.helpers import SMALL_HEADS, build, inputs

RANK = 3
ALPHA = 4.5


def _model(seed: int = 0) -> Kandinsky5Transformer:
    return build(SMALL_HEADS, seed=seed)


def _attach(model: Kandinsky5Transformer, **more: float) -> TrainableLora:
    lora = TrainableLora.attach(model, RANK, ALPHA, seed=5, **more)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in lora.named_parameters().items():
            if name.endswith(".up"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lora


def _arguments() -> dict[str, Tensor]:
    return inputs(SMALL_HEADS, 2, (3, 4, 4), 5, seed=3)


def _loss(velocity: Tensor) -> Tensor:
    return (velocity - torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).square().mean()


def _gradients(lora: TrainableLora) -> dict[str, Tensor]:
    return {name: one.grad for name, one in lora.named_parameters().items() if one.grad is not None}


def test_gradients_of_all_pairs_equal_those_of_explicit_weights() -> None:
    """W + alpha / rank * up @ down as plain weights of the same model, differentiated by autograd."""
    model, plain = _model(), _model().requires_grad_(False)
    lora = _attach(model)
    _loss(model(**_arguments())).backward()
    found = _gradients(lora)
    assert len(found) == 2 * (6 + 2 * 10)
    leaves = {name: one.detach().clone().requires_grad_() for name, one in lora.named_parameters().items()}
    weights: Mapping[str, Tensor] = dict(plain.named_parameters())
    merged = {
        f"{name}.weight": weights[f"{name}.weight"] + ALPHA / RANK * (leaves[f"{name}.up"] @ leaves[f"{name}.down"])
        for name in lora.layers
    }
    _loss(functional_call(plain, merged, (), _arguments())).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert float((found[name] - leaf.grad).norm() / leaf.grad.norm()) < 1e-4, name
    # The base has no gradient at all.
    assert not [name for name, one in model.named_parameters() if one.grad is not None and ".branches." not in name]


@pytest.mark.parametrize("memory", [False, True])
def test_checkpointing_drops_the_same_values_twice(memory: bool) -> None:
    """Blocks run again in the backward pass; dropouts that drew anew there would give the gradient of another loss."""
    results = []
    for checkpointed in (False, True):
        model = _model()
        lora = _attach(model, dropout=0.2, rank_dropout=0.2, module_dropout=0.2)
        lora.training(True)
        if checkpointed:
            checkpoint_blocks(model, HostMemory() if memory else None)
        torch.manual_seed(21)
        _loss(model(**_arguments())).backward()
        results.append(_gradients(lora))
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) < 2 * (6 + 2 * 10), "no module was left out"
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_a_sample_in_between_changes_nothing() -> None:
    """Strength 0 and back, dropouts off and on: the next gradients are the same bit for bit."""
    results = []
    for sampled in (False, True):
        model = _model()
        lora = _attach(model, dropout=0.2)
        lora.training(True)
        if sampled:
            lora.training(False)
            lora.strength = 0.0
            with torch.no_grad():
                assert torch.equal(model(**_arguments()), _model()(**_arguments())), "not the base"
            lora.strength = 1.0
            lora.training(True)
        torch.manual_seed(4)
        _loss(model(**_arguments())).backward()
        results.append(_gradients(lora))
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


@pytest.mark.parametrize("kind", ["plain", "fp8", "swapped"])
def test_it_learns_beside_a_bfloat16_base(kind: str) -> None:
    """Swapped layers have no parameter to tell a device by: the pairs follow the model's own."""
    model = _model().cast_policy(torch.bfloat16)
    if kind == "fp8":
        quantise_blocks(model)
    if kind == "swapped":
        swap_layers(model, 2, torch.device("cpu"))
    lora = TrainableLora.attach(model, 8, 8.0, seed=1)
    parameters = list(lora.named_parameters().values())
    assert {one.dtype for one in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(lora.param_groups(5e-3))
    losses = []
    for _ in range(12):
        loss = _loss(model(**_arguments()))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.isfinite(one).all() for one in parameters)
