"""LoRAs on the real DiT: the whole forward pass against merged weights, quantised, swapped and cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.config.checkpoint import TransformerConfig
from backend.lora.formats import LoraWeights, write_lora
from backend.lora.modules import LoraLinear
from backend.lora.network import attach_loras
from backend.lora.targets import linear_targets
from backend.model.dit import Kandinsky5Transformer
from backend.model.offload import BlockSwap
from backend.model.quantize import Fp8Linear, quantise_blocks
from tests.unit.lora.models import TINY, block_layers, random_lora, skeleton


def _model(seed: int = 0, config: TransformerConfig = TINY) -> Kandinsky5Transformer:
    torch.manual_seed(seed)
    model = Kandinsky5Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Modulation starts at zero, which would close every gate and hide the blocks.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _predict(model: Kandinsky5Transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    config = model.config
    latents = torch.randn(1, 2, 4, 4, config.in_channels, generator=generator)
    text = torch.randn(1, 5, config.in_text_dim, generator=generator)
    pooled = torch.randn(1, config.in_text_dim2, generator=generator)
    with torch.inference_mode():
        return model(latents, text, pooled, torch.tensor([700.0]))


def _merge(model: Kandinsky5Transformer, lora: dict[str, LoraWeights], strength: float) -> None:
    for name, weights in lora.items():
        weight = model.get_submodule(name).weight
        delta = strength * weights.alpha / weights.rank * (weights.up.double() @ weights.down.double())
        weight.data = (weight.double() + delta).to(weight.dtype)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_model_has_the_layers_that_loras_are_trained_for() -> None:
    """6 linear layers a text block and 10 a visual block; modulation is outside the usual scope."""
    model = _model()
    assert set(linear_targets(model)) == set(linear_targets(skeleton()))
    assert len(block_layers(model)) == 6 * TINY.num_text_blocks + 10 * TINY.num_visual_blocks


@pytest.mark.parametrize("file_format", ["kohya", "diffusers", "comfyui"])
def test_the_forward_pass_equals_merged_weights(tmp_path: Path, file_format: str) -> None:
    model, base = _model(), _model()
    plain = _predict(base)
    lora = random_lora(model, linear_targets(model), rank=4, alpha=8.0)
    write_lora(tmp_path / "a.safetensors", lora, file_format)
    loras = attach_loras(model, [(tmp_path / "a.safetensors", 0.6)])
    _merge(base, lora, 0.6)
    found = _predict(model)
    assert _difference(found, plain) > 1e-2
    assert _difference(found, _predict(base)) < 1e-5
    loras.set_strength(0, 0.0)
    assert torch.equal(_predict(model), plain)
    loras.set_strength(0, 0.6)
    loras.detach()
    assert torch.equal(_predict(model), plain)


def test_bfloat16_with_float32_islands(tmp_path: Path) -> None:
    model, exact = _model().cast_policy(torch.bfloat16), _model()
    plain = _predict(model)
    names = [*block_layers(model), "visual_transformer_blocks.0.visual_modulation.out_layer"]
    lora = random_lora(model, names, rank=4, alpha=8.0, dtype=torch.bfloat16)
    write_lora(tmp_path / "a.safetensors", lora)
    loras = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    _merge(exact, lora, 1.0)
    expected = _predict(exact)
    effect = _difference(plain, expected)
    assert _difference(_predict(model), expected) < min(0.02, effect / 3)
    model.to(torch.bfloat16)
    formats = {
        name: target.layer.branches[0].down.dtype for name, target in linear_targets(model).items() if name in lora
    }
    assert formats.pop(names[-1]) == torch.float32
    assert set(formats.values()) == {torch.bfloat16}
    loras.set_strength(0, 0.0)
    assert torch.equal(_predict(model), plain)


@pytest.mark.parametrize("attach_first", [False, True])
def test_on_8_bit_weights_the_effect_is_that_of_full_precision(tmp_path: Path, attach_first: bool) -> None:
    """Traps B11 and T8: the guide's own command combines --fp8_base and --lora_weight."""
    model, base = _model(), _model()
    lora = random_lora(model, rank=4, alpha=8.0)
    write_lora(tmp_path / "a.safetensors", lora)
    if attach_first:
        loras = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    assert quantise_blocks(model) == len(block_layers(base))
    if not attach_first:
        loras = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    quantise_blocks(base)
    quantised = _predict(base)
    dequantised = _model()
    for name in block_layers(dequantised):
        layer = base.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        dequantised.get_submodule(name).weight.data = layer.codes.float() * layer.scale
    _merge(dequantised, lora, 1.0)
    found = _predict(model)
    assert _difference(found, quantised) > 1e-2
    assert _difference(found, _predict(dequantised)) < 1e-5
    loras.set_strength(0, 0.0)
    assert torch.equal(_predict(model), quantised)
    loras.detach()
    assert torch.equal(_predict(model), quantised)


@pytest.mark.parametrize("attach_first", [False, True])
def test_blocks_that_wait_in_cpu_memory_keep_their_loras(tmp_path: Path, attach_first: bool) -> None:
    model, base = _model(), _model()
    lora = random_lora(model)
    write_lora(tmp_path / "a.safetensors", lora)
    path = tmp_path / "a.safetensors"
    if attach_first:
        loras = attach_loras(model, [(path, 1.0)])
    BlockSwap(model, 1, torch.device("cpu")).place()
    if not attach_first:
        loras = attach_loras(model, [(path, 1.0)])
    attach_loras(base, [(path, 1.0)])
    assert torch.equal(_predict(model), _predict(base))
    loras.detach()
    assert torch.equal(_predict(model), _predict(_model()))


def test_a_second_set_on_the_same_model_adds_up(tmp_path: Path) -> None:
    model, base = _model(), _model()
    first, second = random_lora(model, seed=1), random_lora(model, seed=2)
    write_lora(tmp_path / "first.safetensors", first)
    write_lora(tmp_path / "second.safetensors", second)
    attach_loras(model, [(tmp_path / "first.safetensors", 1.0)])
    attach_loras(model, [(tmp_path / "second.safetensors", 1.0)])
    layer = model.get_submodule(block_layers(base)[0])
    assert isinstance(layer, LoraLinear)
    assert len(layer.branches) == 2
    _merge(base, first, 1.0)
    _merge(base, second, 1.0)
    assert _difference(_predict(model), _predict(base)) < 1e-5
