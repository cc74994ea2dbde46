"""A LoRA trained here in diffusers: through PEFT it gives the same latents as our engine, and every bit comes back."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky
from safetensors.torch import load_file

from backend.config.checkpoint import identify
from backend.config.generate import GenerateOptions
from backend.events import NullJournal
from backend.lora.convert import original_layers, write_converted
from backend.lora.formats import LoraFormat, LoraWeights, read_lora, write_lora
from backend.lora.targets import linear_targets, resolve
from backend.lora.trainable import TrainableLora
from backend.progress import Reporter
from backend.sampling.generate import generate
from backend.sampling.outputs import read_latent
from tests.integration.diffusers_oracle import Oracle, build_oracle, official_sigmas
from tests.integration.test_against_diffusers import _TorchWithoutBfloat16
from tests.unit.lora.models import skeleton
from tests.unit.model.helpers import SMALL_HEADS, build, build_diffusers, diffusers_forward, inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
RELATIVE = 1e-4
RANK = 4
CLIP: dict[str, Any] = {"width": 48, "height": 32, "frames": 9, "steps": 3, "guidance": 2.0, "scheduler_scale": 5.0,
                        "seed": 5}  # fmt: skip
# 1.5 times the rank is no power of two, so alpha / rank is multiplied into `up` with rounding; half of it is one.
ALPHAS = (6.0, 2.0)


def _trained(model: torch.nn.Module, alpha: float, seed: int = 1) -> TrainableLora:
    """As training leaves it: up is random as well, and large enough to be seen in a clip."""
    lora = TrainableLora.attach(model, RANK, alpha, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.named_parameters().items():
            if name.endswith(".up"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lora


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return build_oracle(tmp_path_factory.mktemp("oracle"), 64, seed=64)


@pytest.fixture
def exact_rotary() -> Iterator[None]:
    """diffusers without its rounding of rotated queries and keys to bfloat16, which hides differences of 1e-4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_kandinsky, "torch", _TorchWithoutBfloat16())
        yield


def _ours(oracle: Oracle, folder: Path, **values: Any) -> torch.Tensor:
    options = GenerateOptions(
        task="k5-demo-t2v", prompt="a red circle", negative_prompt="blue", dit=str(oracle.dit), vae=str(oracle.vae),
        **CLIP, **values, output=str(folder / "clip.mp4"), output_type="latent", text_cache_dir=str(folder / "text"),
    )  # fmt: skip
    generate(options, Reporter(NullJournal()))
    return read_latent(folder / "clip.latent.safetensors")[0]


def _theirs(pipeline: Any) -> torch.Tensor:
    official_sigmas(pipeline, CLIP["steps"], CLIP["scheduler_scale"])
    result = pipeline(
        prompt="a red circle", negative_prompt="blue", width=CLIP["width"],
        height=CLIP["height"], num_frames=CLIP["frames"], num_inference_steps=CLIP["steps"],
        guidance_scale=CLIP["guidance"], generator=torch.Generator().manual_seed(CLIP["seed"]), output_type="latent",
        max_sequence_length=256,
    )  # fmt: skip
    return result.frames[0].permute(3, 0, 1, 2)


@pytest.mark.usefixtures("exact_rotary")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_trained_lora_gives_the_same_latents_in_diffusers_pipeline(
    oracle: Oracle, tmp_path: Path, alpha: float
) -> None:
    info = identify(oracle.dit)
    assert info.config is not None
    layers = _trained(skeleton(info.config), alpha).weights()
    ours, theirs = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    write_lora(ours, layers)
    write_converted(theirs, layers, "diffusers", {})
    base = _ours(oracle, tmp_path)
    found = {
        strength: _ours(oracle, tmp_path, lora_weight=[str(ours)], lora_multiplier=[strength])
        for strength in (1.0, 0.5)
    }
    assert _relative(found[1.0], base) > 0.01, "the LoRA has no effect"
    pipeline = oracle.t2v
    pipeline.load_lora_weights(str(tmp_path), weight_name=theirs.name, adapter_name="trained")
    try:
        for strength, latents in found.items():
            pipeline.set_adapters("trained", strength)
            difference = _relative(latents, _theirs(pipeline))
            print(f"alpha {alpha:g}, rank {RANK}, strength {strength:g}: relative difference {difference:.1e}")
            assert difference < RELATIVE
    finally:
        pipeline.unload_lora_weights()
    assert _relative(base, _theirs(pipeline)) < RELATIVE


@pytest.mark.usefixtures("exact_rotary")
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("writer", ["write_lora", "write_converted"])
def test_the_model_in_training_is_what_diffusers_makes_of_its_file(tmp_path: Path, alpha: float, writer: str) -> None:
    """The very modules that are trained against PEFT's, in one forward pass."""
    # A copy: diffusers leaves PEFT's layers in a model, and this one is shared by other tests.
    model, theirs = build(SMALL_HEADS), deepcopy(build_diffusers(SMALL_HEADS))
    arguments = inputs(SMALL_HEADS, 2, (3, 4, 6), 7, seed=3)
    with torch.no_grad():
        base = model(**arguments)
        lora = _trained(model, alpha)
        ours = model(**arguments)
    assert _relative(ours, base) > 0.01
    path = tmp_path / "a.safetensors"
    if writer == "write_lora":
        write_lora(path, lora.weights(), "diffusers")
    else:
        write_converted(path, lora.weights(), "diffusers", {})
    theirs.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer", adapter_name="trained")
    try:
        assert _relative(ours, diffusers_forward(theirs, arguments, (1.0, 2.0, 2.0))) < RELATIVE / 10
    finally:
        theirs.delete_adapters("trained")


def _round_trip(folder: Path, layers: dict[str, LoraWeights]) -> tuple[Path, Path]:
    """kohya -> diffusers -> ComfyUI -> kohya, each step from the file before; returns the first and the last file."""
    targets = linear_targets(skeleton())
    first = path = folder / "first.safetensors"
    write_lora(first, layers)
    steps: tuple[LoraFormat, ...] = ("diffusers", "comfyui", "kohya")
    for target in steps:
        file = read_lora(path)
        path = folder / f"{target}.safetensors"
        write_converted(path, original_layers(file, resolve(file, targets)), target, file.metadata)
    return first, path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4.0, 2.0, 6.0, 1.7])
def test_the_way_round_through_three_formats_loses_no_bit(tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    """Bit for bit with every alpha: what cannot be multiplied into `up` without loss is kept beside it."""
    layers = {
        name: LoraWeights(pair.down.to(dtype), pair.up.to(dtype), pair.alpha)
        for name, pair in _trained(skeleton(), alpha).weights().items()
    }
    first, last = (load_file(path) for path in _round_trip(tmp_path, layers))
    assert first.keys() == last.keys()
    assert all(torch.equal(tensor, last[key]) and tensor.dtype == last[key].dtype for key, tensor in first.items())


@pytest.mark.parametrize(("alpha", "limit"), [(2.0, 0.0), (6.0, 2.0**-24)])
def test_a_diffusers_file_with_alpha_in_it(tmp_path: Path, alpha: float, limit: float) -> None:
    """write_lora multiplies alpha / rank into `up`: bit for bit for a power of two, else to half a unit of float32."""
    layers = _trained(skeleton(), alpha).weights()
    write_lora(tmp_path / "a.safetensors", layers, "diffusers")
    found = resolve(read_lora(tmp_path / "a.safetensors"), linear_targets(skeleton()))
    for name, pair in layers.items():
        assert torch.equal(found[name].down, pair.down)
        expected = pair.up.double() * (alpha / RANK)
        assert ((found[name].up.double() - expected).abs() <= limit * expected.abs()).all()
