"""LoRAs added to weights: against float64 arithmetic, before quantisation, and nothing half done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from backend.errors import UserError
from backend.lora.formats import LoraWeights, write_lora
from backend.lora.merge import merge_loras
from backend.lora.network import attach_loras
from backend.lora.targets import linear_targets
from backend.model.dit import Kandinsky5Transformer
from backend.model.quantize import Fp8Linear, quantise_blocks
from tests.unit.lora.models import TINY, block_layers, random_lora, skeleton

MODULATION = "visual_transformer_blocks.0.visual_modulation.out_layer"


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _exact(base: torch.Tensor, parts: list[tuple[LoraWeights, float]]) -> torch.Tensor:
    total = base.double()
    for weights, strength in parts:
        total = total + strength * weights.alpha / weights.rank * (weights.up.double() @ weights.down.double())
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file_format", ["kohya", "diffusers", "comfyui"])
def test_several_loras_add_up_and_the_weight_is_rounded_once(
    tmp_path: Path, dtype: torch.dtype, file_format: str
) -> None:
    model, base = skeleton(dtype=dtype), skeleton(dtype=dtype)
    first = random_lora(model, rank=4, alpha=2.0, seed=1)
    second = random_lora(model, [*block_layers(model)[::2], MODULATION], rank=2, alpha=8.0, seed=2)
    write_lora(tmp_path / "first.safetensors", first, file_format)
    write_lora(tmp_path / "second.safetensors", second, file_format)
    merge_loras(model, [(tmp_path / "first.safetensors", 0.5), (tmp_path / "second.safetensors", -1.5)])
    for name, target in linear_targets(base).items():
        parts = [(lora[name], strength) for lora, strength in ((first, 0.5), (second, -1.5)) if name in lora]
        found = linear_targets(model)[name].layer
        before, after = target.layer.weight, found.weight
        assert after.dtype == dtype
        if not parts:
            assert torch.equal(after, before)
            continue
        exact = _exact(before, parts).to(dtype)
        if dtype == torch.float32:
            assert torch.allclose(after, exact, rtol=1e-6, atol=1e-6), name
        else:  # Rounded twice, one value in eight would be another one.
            assert float((after == exact).double().mean()) > 0.98, name
        if target.layer.bias is not None:
            assert torch.equal(found.bias, target.layer.bias)


def test_the_order_of_the_files_does_not_matter_beyond_rounding(tmp_path: Path) -> None:
    model, other = skeleton(), skeleton()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        write_lora(path, random_lora(model, seed=seed + 1))
    merge_loras(model, [(paths[0], 0.3), (paths[1], 0.9)])
    merge_loras(other, [(paths[1], 0.9), (paths[0], 0.3)])
    for name, weight in _weights(model).items():
        assert torch.allclose(weight, _weights(other)[name], rtol=1e-6, atol=1e-6)


def test_strength_zero_changes_no_bit(tmp_path: Path) -> None:
    model = skeleton()
    before = _weights(model)
    write_lora(tmp_path / "a.safetensors", random_lora(model))
    merge_loras(model, [(tmp_path / "a.safetensors", 0.0)])
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(model).items())


def test_equals_the_same_lora_beside_the_weights(tmp_path: Path) -> None:
    merged, beside = _dit(), _dit()
    write_lora(tmp_path / "a.safetensors", random_lora(merged, rank=4, alpha=8.0))
    plain = _predict(merged)
    merge_loras(merged, [(tmp_path / "a.safetensors", 0.7)])
    attach_loras(beside, [(tmp_path / "a.safetensors", 0.7)])
    assert _difference(_predict(merged), plain) > 1e-2
    assert _difference(_predict(merged), _predict(beside)) < 1e-5


@pytest.mark.parametrize("broken", ["missing", "other model", "not finite", "strength"])
def test_nothing_is_touched_when_one_file_is_bad(tmp_path: Path, broken: str) -> None:
    model = skeleton()
    before = _weights(model)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    write_lora(good, random_lora(model))
    lora = random_lora(model)
    if broken == "other model":
        lora["visual_transformer_blocks.9.self_attention.to_query"] = lora[block_layers(model)[0]]
    if broken == "not finite":
        next(iter(lora.values())).up[0, 0] = float("nan")
    if broken != "missing":
        write_lora(bad, lora)
    strength = float("inf") if broken == "strength" else 1.0
    with pytest.raises(UserError) as caught:
        merge_loras(model, [(good, 1.0), (bad, strength)], field="base_weights")
    assert caught.value.field == ("lora_multiplier" if broken == "strength" else "base_weights")
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(model).items())


def test_quantised_layers_are_refused_and_unchanged(tmp_path: Path) -> None:
    """Traps T8 and B11: a difference that is added to 8-bit codes is rounded away."""
    model = _dit()
    lora = random_lora(model, [MODULATION, *block_layers(model)])
    write_lora(tmp_path / "a.safetensors", lora)
    quantise_blocks(model)
    plain = _predict(model)
    with pytest.raises(UserError, match="Merge it before the model is quantised"):
        merge_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    assert torch.equal(_predict(model), plain)


def test_merged_before_quantisation_the_effect_is_that_of_full_precision(tmp_path: Path) -> None:
    """Traps T8 and B11, the other way round: merge, then quantise, and the codes hold the LoRA."""
    model, base, exact = _dit(), _dit(), _dit()
    names = block_layers(model)
    lora = random_lora(model, rank=4, alpha=4.0)
    write_lora(tmp_path / "a.safetensors", lora)
    merge_loras(model, [(tmp_path / "a.safetensors", 1.0)])
    assert quantise_blocks(model) == quantise_blocks(base) == len(names)
    for name in names:
        before, after = (layers.get_submodule(name) for layers in (base, model))
        assert isinstance(before, Fp8Linear)
        assert isinstance(after, Fp8Linear)
        wanted = _exact(torch.zeros(()), [(lora[name], 1.0)])
        original = exact.get_submodule(name).weight.double()
        # 8-bit codes keep 3 bits of mantissa: half a step is 1/16 of a value, so the difference carries that noise.
        applied = after.codes.double() * after.scale.double() - before.codes.double() * before.scale.double()
        noise = float((original + wanted).norm() + original.norm()) * 0.04
        assert float((applied - wanted).norm()) < noise, name
        share = float((applied * wanted).sum() / (wanted * wanted).sum())
        assert abs(share - 1) < 0.1, f"{name}: {share:.3f} of the wanted difference is there"
    merge_loras(exact, [(tmp_path / "a.safetensors", 1.0)])
    effect = _difference(_predict(base), _predict(exact))
    assert _difference(_predict(model), _predict(exact)) < effect / 3


def _dit(seed: int = 0) -> Kandinsky5Transformer:
    torch.manual_seed(seed)
    model = Kandinsky5Transformer(TINY).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Modulation starts at zero, which would close every gate and hide the blocks.
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _predict(model: Kandinsky5Transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 2, 4, 4, model.config.in_channels, generator=generator)
    text = torch.randn(1, 5, model.config.in_text_dim, generator=generator)
    pooled = torch.randn(1, model.config.in_text_dim2, generator=generator)
    with torch.inference_mode():
        return model(latents, text, pooled, torch.tensor([700.0]))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
