"""LoRAs at generation: three spellings of one LoRA, merged weights, strengths, 8-bit weights, the record in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.metadata import read_settings
from backend.config.tasks import DEMO_WEIGHTS
from backend.files import fingerprint
from backend.lora.formats import LoraWeights, write_lora
from backend.sampling.outputs import read_latent
from tests.integration.command import TINY, run_command
from tests.unit.lora.models import random_lora, skeleton

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
# Without guidance: a second pass with the same LoRA would hide part of its effect.
WORDS = (*TINY, "--prompt", "a red circle", "--guidance", "1", "--output_type", "latent")
RANK = 4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def _random_lora(seed: int) -> dict[str, LoraWeights]:
    """alpha = rank, so that all three spellings hold the very same numbers."""
    return random_lora(skeleton(KNOWN_ARCHITECTURES["demo"]), rank=RANK, alpha=float(RANK), seed=seed)


@pytest.fixture(scope="module")
def files(work: Path) -> dict[str, Path]:
    paths = {}
    for name in ("kohya", "diffusers", "comfyui"):
        paths[name] = work / f"{name}.safetensors"
        write_lora(paths[name], _random_lora(1), name)
    paths["second"] = work / "second.safetensors"
    write_lora(paths["second"], _random_lora(2), "kohya")
    return paths


def _latents(work: Path, name: str, *words: str) -> torch.Tensor:
    run = run_command(work / name, *WORDS, *words)
    assert run.code == 0, run.stderr
    return read_latent(run.files()[0])[0]


@pytest.fixture(scope="module")
def base(work: Path) -> torch.Tensor:
    return _latents(work, "base")


@pytest.fixture(scope="module")
def with_lora(work: Path, files: dict[str, Path]) -> torch.Tensor:
    return _latents(work, "with", "--lora_weight", str(files["kohya"]))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _merged_weights(work: Path, name: str, loras: list[tuple[dict[str, LoraWeights], float]]) -> Path:
    """The demo DiT with the LoRAs added to its weights in float64, by their definition."""
    weights = load_file(next((DEMO_WEIGHTS / "transformer").glob("*.safetensors")))
    for lora, strength in loras:
        for layer, pair in lora.items():
            key = f"{layer}.weight"
            delta = strength * pair.alpha / RANK * (pair.up.double() @ pair.down.double())
            weights[key] = weights[key].double() + delta
    path = work / f"{name}.safetensors"
    save_file({key: tensor.float().contiguous() for key, tensor in weights.items()}, path)
    return path


def test_a_lora_is_merged_weights_in_effect(work: Path, base: torch.Tensor, with_lora: torch.Tensor) -> None:
    merged = _latents(work, "merged", "--dit", str(_merged_weights(work, "one", [(_random_lora(1), 1.0)])))
    assert _relative(with_lora, base) > 0.02
    assert _relative(with_lora, merged) < 1e-4


def test_two_loras_with_strengths_are_merged_weights_too(work: Path, files: dict[str, Path]) -> None:
    loras = [(_random_lora(1), 0.5), (_random_lora(2), -0.75)]
    merged = _latents(work, "merged two", "--dit", str(_merged_weights(work, "two", loras)))
    found = _latents(
        work, "two", "--lora_weight", str(files["comfyui"]), str(files["second"]), "--lora_multiplier", "0.5", "-0.75"
    )
    assert _relative(found, merged) < 1e-4


@pytest.mark.parametrize("name", ["diffusers", "comfyui"])
def test_three_spellings_give_one_clip(work: Path, files: dict[str, Path], with_lora: torch.Tensor, name: str) -> None:
    assert torch.equal(_latents(work, name, "--lora_weight", str(files[name])), with_lora)


def test_strength_zero_is_the_base_bit_for_bit(work: Path, files: dict[str, Path], base: torch.Tensor) -> None:
    words = ("--lora_weight", str(files["kohya"]), str(files["second"]), "--lora_multiplier", "0", "0")
    assert torch.equal(_latents(work, "zero", *words), base)


def test_a_lora_is_not_lost_in_eight_bit_weights(
    work: Path, files: dict[str, Path], base: torch.Tensor, with_lora: torch.Tensor
) -> None:
    """Trap B11: a peer merges into codes and loses the LoRA. Here its effect is the same with and without them."""
    plain = _latents(work, "fp8", "--fp8_base")
    found = _latents(work, "fp8 lora", "--fp8_base", "--lora_weight", str(files["kohya"]))
    effect, expected = (found - plain).flatten(), (with_lora - base).flatten()
    similarity = float(torch.nn.functional.cosine_similarity(effect, expected, dim=0))
    print(f"effect of the LoRA: relative {_relative(effect, expected):.3f}, cosine {similarity:.4f}")
    assert similarity > 0.95
    assert 0.8 < float(effect.norm() / expected.norm()) < 1.25


def test_loras_are_recorded(work: Path, files: dict[str, Path]) -> None:
    words = ("--lora_weight", str(files["kohya"]), str(files["second"]), "--lora_multiplier", "0.25")
    run = run_command(work / "recorded", *WORDS, *words)
    assert read_settings(run.files()[0])["loras"] == [
        {"path": str(files["kohya"]), "fingerprint": fingerprint(files["kohya"]), "strength": 0.25},
        {"path": str(files["second"]), "fingerprint": fingerprint(files["second"]), "strength": 1.0},
    ]


def test_keys_that_match_nothing_are_an_error(work: Path) -> None:
    lora = _random_lora(1)
    tensors = {}
    for name, pair in [
        *lora.items(),
        ("visual_transformer_blocks.77.self_attention.to_query", next(iter(lora.values()))),
    ]:
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = pair.down.clone()
        tensors[f"{stem}.lora_up.weight"] = pair.up.clone()
        tensors[f"{stem}.alpha"] = torch.tensor(pair.alpha)
    save_file(tensors, work / "extra.safetensors")
    run = run_command(work / "extra", *WORDS, "--lora_weight", str(work / "extra.safetensors"))
    assert run.code == 2
    assert "blocks_77" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.files() == []
