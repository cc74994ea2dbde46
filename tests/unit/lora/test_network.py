"""LoRA layers against the closed form of merged weights, and what attaching and detaching leave behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from backend.errors import UserError
from backend.lora.formats import write_lora
from backend.lora.modules import LoraLinear
from backend.lora.network import attach_loras
from backend.lora.targets import linear_targets
from tests.unit.lora.models import TINY, block_layers, merged, random_lora, skeleton

FORMATS = ("kohya", "diffusers", "comfyui")


def _inputs(model: nn.Module, seed: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(2, 3, target.shape[1], generator=generator).to(dtype)
        for name, target in linear_targets(model).items()
    }


def _outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: target.layer(inputs[name]) for name, target in linear_targets(model).items()}


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("file_format", FORMATS)
def test_equals_merged_weights(tmp_path: Path, file_format: str) -> None:
    model, base = skeleton(), skeleton()
    lora = random_lora(model)
    write_lora(tmp_path / "a.safetensors", lora, file_format)
    attach_loras(model, [(tmp_path / "a.safetensors", 0.7)])
    inputs = _inputs(model)
    found = _outputs(model, inputs)
    for name, target in linear_targets(base).items():
        pairs = [(lora[name], 0.7)] if name in lora else []
        assert _relative(found[name], merged(target.layer, pairs, inputs[name])) < 1e-6, name


def test_every_linear_of_the_model_can_carry_a_lora(tmp_path: Path) -> None:
    model, base = skeleton(), skeleton()
    lora = random_lora(model, linear_targets(model))
    assert "visual_transformer_blocks.1.visual_modulation.out_layer" in lora
    assert "out_layer.modulation.out_layer" in lora
    write_lora(tmp_path / "a.safetensors", lora)
    attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    inputs = _inputs(model)
    for name, output in _outputs(model, inputs).items():
        expected = merged(linear_targets(base)[name].layer, [(lora[name], 1.0)], inputs[name])
        assert _relative(output, expected) < 1e-6, name


def test_all_three_formats_give_identical_outputs(tmp_path: Path) -> None:
    """alpha / rank = 0.5 is a power of two, so the diffusers file, which holds it inside `up`, loses nothing."""
    outputs = []
    for file_format in FORMATS:
        model = skeleton()
        write_lora(tmp_path / "a.safetensors", random_lora(model, rank=2, alpha=1.0), file_format)
        attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
        outputs.append(_outputs(model, _inputs(model)))
    for name, first in outputs[0].items():
        assert torch.allclose(first, outputs[1][name], rtol=0, atol=1e-6)
        assert torch.equal(first, outputs[2][name])


def test_several_loras_add_up_and_change_strength_without_a_reload(tmp_path: Path) -> None:
    model, base = skeleton(), skeleton()
    first, second = random_lora(model, seed=1), random_lora(model, block_layers(model)[::2], rank=5, alpha=5.0, seed=2)
    write_lora(tmp_path / "first.safetensors", first)
    write_lora(tmp_path / "second.safetensors", second, "diffusers")
    loras = attach_loras(model, [(tmp_path / "first.safetensors", 1.0), (tmp_path / "second.safetensors", -0.5)])
    (tmp_path / "first.safetensors").unlink()
    (tmp_path / "second.safetensors").unlink()
    inputs = _inputs(model)
    for strengths in ((1.0, -0.5), (0.25, 2.0), (0.0, 1.0), (1.5, 0.0)):
        for index, strength in enumerate(strengths):
            loras.set_strength(index, strength)
        assert loras.strengths == strengths
        found = _outputs(model, inputs)
        for name, target in linear_targets(base).items():
            pairs = [(lora[name], s) for lora, s in zip((first, second), strengths, strict=True) if name in lora]
            assert _relative(found[name], merged(target.layer, pairs, inputs[name])) < 1e-6, (name, strengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_base_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = skeleton(dtype=dtype)
    inputs = _inputs(model, dtype=dtype)
    before = _outputs(model, inputs)
    write_lora(tmp_path / "a.safetensors", random_lora(model))
    loras = attach_loras(model, [(tmp_path / "a.safetensors", 0.0)])
    assert all(torch.equal(output, before[name]) for name, output in _outputs(model, inputs).items())
    loras.set_strength(0, 1.0)
    changed = {name for name, output in _outputs(model, inputs).items() if not torch.equal(output, before[name])}
    assert changed == set(block_layers(skeleton()))
    loras.set_strength(0, 0.0)
    assert all(torch.equal(output, before[name]) for name, output in _outputs(model, inputs).items())


def test_detach_gives_back_the_original_modules(tmp_path: Path) -> None:
    model = skeleton()
    original = {name: target.layer for name, target in linear_targets(model).items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_lora(tmp_path / "a.safetensors", random_lora(model))
    first = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    second = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    assert list(linear_targets(model)) == list(linear_targets(skeleton()))
    first.detach()
    layer = linear_targets(model)["visual_transformer_blocks.0.self_attention.to_query"].layer
    assert isinstance(layer, LoraLinear)
    assert len(layer.branches) == 1
    second.detach()
    second.detach()
    assert {name: target.layer for name, target in linear_targets(model).items()} == original
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert set(model.state_dict()) == set(state)


def test_bfloat16_base_rounds_the_sum_once(tmp_path: Path) -> None:
    """Adding a rounded difference to a rounded output is worse; the sum inside the product is as good as merging."""
    model, base = skeleton(dtype=torch.bfloat16), skeleton(dtype=torch.bfloat16)
    lora = random_lora(model, rank=8, alpha=8.0, dtype=torch.bfloat16)
    write_lora(tmp_path / "a.safetensors", lora)
    attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    inputs = _inputs(model, dtype=torch.bfloat16)
    errors = []
    for name, output in _outputs(model, inputs).items():
        assert output.dtype == torch.bfloat16
        if name in lora:
            errors.append(
                _relative(output, merged(linear_targets(base)[name].layer, [(lora[name], 1.0)], inputs[name]))
            )
    assert max(errors) < 5e-3


def test_a_float16_file_on_a_float32_island(tmp_path: Path) -> None:
    model, base = skeleton(), skeleton()
    name = "visual_transformer_blocks.0.visual_modulation.out_layer"
    lora = random_lora(model, [name], dtype=torch.float16)
    write_lora(tmp_path / "a.safetensors", lora)
    attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    x = _inputs(model)[name]
    layer = linear_targets(model)[name].layer
    assert isinstance(layer, LoraLinear)
    assert layer.branches[0].down.dtype == torch.float32
    expected = merged(linear_targets(base)[name].layer, [(lora[name], 1.0)], x)
    assert _relative(layer(x), expected) < 1e-6


class _QuantisedLinear(nn.Module):
    """A Linear whose weight is 8-bit codes and one scale, as quantised checkpoints have it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = layer.weight.abs().max() / 448.0
        self.weight = nn.Parameter((layer.weight / self.scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.bias = layer.bias

    def dequantised(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight.data = self.weight.float() * self.scale
        if self.bias is not None:
            layer.bias.data = self.bias.data
        return layer.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def test_a_lora_on_quantised_weights_keeps_its_full_effect(tmp_path: Path) -> None:
    """Traps B11 and T8: a LoRA added to 8-bit codes without their scale is lost; here the codes are never touched."""
    model = skeleton()
    for target in linear_targets(model).values():
        setattr(target.parent, target.attribute, _QuantisedLinear(target.layer))
    codes = {name: target.layer.weight.float() for name, target in linear_targets(model).items()}
    lora = random_lora(model)
    write_lora(tmp_path / "a.safetensors", lora, dtype=torch.bfloat16)
    stored = {name: type(pair)(pair.down.bfloat16(), pair.up.bfloat16(), pair.alpha) for name, pair in lora.items()}
    attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    inputs = _inputs(model)
    outputs = _outputs(model, inputs)
    for name, target in linear_targets(model).items():
        assert torch.equal((target.layer.base if name in lora else target.layer).weight.float(), codes[name])
        if name in lora:
            expected = merged(target.layer.base.dequantised(), [(stored[name], 1.0)], inputs[name])
            assert _relative(outputs[name], expected) < 1e-6, name


def test_names_of_compiled_blocks_match(tmp_path: Path) -> None:
    """Trap T10: a compiled block adds `_orig_mod` to the names, in the model and in files saved from one."""

    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    model = skeleton()
    lora = random_lora(model)
    compiled_names = {name.replace("_blocks.0.", "_blocks.0._orig_mod."): pair for name, pair in lora.items()}
    blocks = model.get_submodule("visual_transformer_blocks")
    blocks.add_module("0", Compiled(blocks.get_submodule("0")))
    for file_format in FORMATS:
        for index, names in enumerate((lora, compiled_names)):
            path = tmp_path / f"{file_format}{index}.safetensors"
            write_lora(path, names, file_format)
            loras = attach_loras(model, [(path, 1.0)])
            layer = blocks.get_submodule("0._orig_mod.self_attention.out_layer")
            assert isinstance(layer, LoraLinear)
            loras.detach()


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_no_number_is_refused(tmp_path: Path, strength: float) -> None:
    model = skeleton()
    write_lora(tmp_path / "a.safetensors", random_lora(model))
    with pytest.raises(UserError) as caught:
        attach_loras(model, [(tmp_path / "a.safetensors", strength)])
    assert caught.value.field == "lora_multiplier"
    loras = attach_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    with pytest.raises(UserError):
        loras.set_strength(0, strength)
    assert loras.strengths == (1.0,)


def test_a_bad_second_file_leaves_the_model_untouched(tmp_path: Path) -> None:
    model = skeleton()
    original = {name: target.layer for name, target in linear_targets(model).items()}
    write_lora(tmp_path / "good.safetensors", random_lora(model))
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" + b"\0" * 40)
    with pytest.raises(UserError) as caught:
        attach_loras(model, [(tmp_path / "good.safetensors", 1.0), (tmp_path / "bad.safetensors", 1.0)])
    assert "bad.safetensors" in caught.value.message
    assert {name: target.layer for name, target in linear_targets(model).items()} == original


def test_gradients_reach_the_pair_and_not_the_base(tmp_path: Path) -> None:
    model = skeleton()
    write_lora(tmp_path / "a.safetensors", random_lora(model))
    attach_loras(model, [(tmp_path / "a.safetensors", 0.5)])
    layer = linear_targets(model)["text_transformer_blocks.0.feed_forward.in_layer"].layer
    assert isinstance(layer, LoraLinear)
    layer.branches.requires_grad_(True)
    x = torch.randn(4, TINY.model_dim, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.base.weight.grad is None
    pair = layer.branches[0]
    for gradient in (pair.down.grad, pair.up.grad, x.grad):
        assert gradient is not None
        assert gradient.abs().sum() > 0
