"""Names of other software: right for every layer of every known model, and no bit lost on the way round."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.errors import UserError
from backend.lora.architecture import fit_lora, known_layers
from backend.lora.convert import BAKED_KEY, original_layers, write_converted
from backend.lora.formats import LoraFormat, LoraWeights, read_lora, write_lora
from backend.lora.patterns import trainable_names

DEMO = KNOWN_ARCHITECTURES["demo"]


def _random(architecture: str = "demo", rank: int = 4, alpha: float = 2.0, dtype: torch.dtype = torch.float32, **keys):
    generator = torch.Generator().manual_seed(3)
    targets = known_layers(KNOWN_ARCHITECTURES[architecture])
    layers = {}
    for name in trainable_names(targets):
        out, width = targets[name].shape
        down, up = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        layers[name] = LoraWeights(down.to(dtype), up.to(dtype), keys.get(name, alpha))
    return layers


def _through(folder: Path, layers: dict[str, LoraWeights], *formats: LoraFormat) -> Path:
    path = folder / "start.safetensors"
    write_lora(path, layers, formats[0], {"ss_steps": "7"})
    for number, name in enumerate(formats[1:]):
        file = read_lora(path)
        path = folder / f"{number}-{name}.safetensors"
        write_converted(path, original_layers(file, fit_lora(file).layers), name, file.metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [4.0, 2.0, 1.0, 3.0, 0.7])
def test_kohya_to_diffusers_to_comfyui_to_kohya_keeps_every_bit(
    tmp_path: Path, dtype: torch.dtype, alpha: float
) -> None:
    layers = _random(alpha=alpha, dtype=dtype)
    end = _through(tmp_path, layers, "kohya", "diffusers", "comfyui", "kohya")
    start, found = load_file(tmp_path / "start.safetensors"), load_file(end)
    assert set(start) == set(found)
    for key, tensor in start.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    with safe_open(end, "pt") as handle:
        metadata = handle.metadata()
    assert metadata["ss_steps"] == "7"
    assert BAKED_KEY not in metadata


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_the_middle_of_the_way_has_the_same_effect(tmp_path: Path, alpha: float) -> None:
    """What a reader makes of the diffusers file, be alpha multiplied in (2 / 4) or beside it (3 / 4 in bfloat16)."""
    layers = _random(alpha=alpha, dtype=torch.bfloat16)
    file = read_lora(_through(tmp_path, layers, "kohya", "diffusers"))
    for name, pair in fit_lora(file).layers.items():
        found = pair.alpha / pair.rank * (pair.up.double() @ pair.down.double())
        given = layers[name]
        assert torch.equal(found, given.alpha / given.rank * (given.up.double() @ given.down.double()))


@pytest.mark.parametrize("architecture", ["pro", "lite", "image_lite", "demo"])
def test_dotted_names_are_the_model_s_own(tmp_path: Path, architecture: str) -> None:
    """Trap B25: a peer turns `self_attention_out_layer` into `self.attention.out.layer`."""
    path = _through(tmp_path, _random(architecture, rank=1, alpha=1.0), "kohya", "comfyui")
    stems = {key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0] for key in load_file(path) if "lora_A" in key}
    tensors = KNOWN_ARCHITECTURES[architecture].expected_tensors()
    matrices = {
        name.removesuffix(".weight")
        for name, shape in tensors.items()
        if "_blocks." in name and len(shape) == 2 and "modulation" not in name
    }
    assert stems == matrices
    if architecture == "pro":
        assert len(stems) == 624
        assert "visual_transformer_blocks.59.cross_attention.out_layer" in stems


def test_layers_with_alphas_of_their_own_come_through(tmp_path: Path) -> None:
    odd = "visual_transformer_blocks.3.feed_forward.in_layer"
    layers = _random(alpha=2.0, **{odd: 3.0})
    layers["text_transformer_blocks.0.self_attention.to_key"] = LoraWeights(
        torch.randn(7, DEMO.model_dim), torch.randn(DEMO.model_dim, 7), 5.0
    )
    file = read_lora(_through(tmp_path, layers, "kohya", "diffusers", "comfyui"))
    found = fit_lora(file).layers
    assert {name: (pair.rank, pair.alpha) for name, pair in found.items()} == {
        name: (pair.rank, pair.alpha) for name, pair in layers.items()
    }


def test_diffusers_reads_the_alpha_that_is_beside_the_pairs(tmp_path: Path) -> None:
    """alpha / rank = 0.75 cannot be multiplied into bfloat16 without loss, so it is in the file's metadata."""
    import diffusers

    odd = "visual_transformer_blocks.1.self_attention.to_value"
    layers = _random(alpha=3.0, dtype=torch.bfloat16, **{odd: 1.0})
    path = _through(tmp_path, layers, "kohya", "diffusers")
    assert BAKED_KEY not in read_lora(path).metadata
    model = diffusers.Kandinsky5Transformer3DModel(**asdict(DEMO))
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="transformer", adapter_name="a")
    for name, pair in layers.items():
        layer = model.get_submodule(name)
        assert layer.scaling["a"] == pair.alpha / pair.rank
        assert torch.equal(layer.lora_B["a"].weight.to(torch.bfloat16), pair.up)


def test_a_peft_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    layers = _random(alpha=4.0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for name, pair in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "peft_type": "LORA"}))
    file = read_lora(folder)
    write_converted(tmp_path / "out.safetensors", original_layers(file, fit_lora(file).layers), "kohya", {})
    found = fit_lora(read_lora(tmp_path / "out.safetensors")).layers
    assert {pair.alpha for pair in found.values()} == {6.0}
    assert all(torch.equal(found[name].up, pair.up) for name, pair in layers.items())


def test_precision_is_changed_when_asked_and_refused_when_it_overflows(tmp_path: Path) -> None:
    layers = _random()
    write_converted(tmp_path / "half.safetensors", layers, "kohya", {}, "bf16")
    found = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for key, tensor in found.items() if not key.endswith("alpha")} == {torch.bfloat16}
    name = next(iter(layers))
    layers[name].up[0, 0] = 1e6
    with pytest.raises(UserError, match="cannot hold these weights"):
        write_converted(tmp_path / "no.safetensors", layers, "kohya", {}, "fp16")
    assert not (tmp_path / "no.safetensors").exists()


def test_a_lora_of_no_known_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pair = LoraWeights(torch.randn(2, 30), torch.randn(30, 2), 2.0)
    write_lora(tmp_path / "a.safetensors", {"visual_transformer_blocks.0.self_attention.to_query": pair})
    with pytest.raises(UserError, match=r"fits no known Kandinsky 5 model.*--dit"):
        fit_lora(read_lora(tmp_path / "a.safetensors"))
    other = LoraWeights(torch.randn(2, 192), torch.randn(192, 2), 2.0)
    write_lora(tmp_path / "b.safetensors", {"visual_transformer_blocks.77.self_attention.to_query": other})
    with pytest.raises(UserError, match="match no layer"):
        fit_lora(read_lora(tmp_path / "b.safetensors"))


def test_a_damaged_note_of_alphas_is_refused(tmp_path: Path) -> None:
    layers = _random(alpha=2.0)
    file = read_lora(_through(tmp_path, layers, "kohya", "diffusers"))
    for note in ("{", "[]", json.dumps(dict.fromkeys(layers, 0.0)), "{}"):
        file.metadata[BAKED_KEY] = note
        with pytest.raises(UserError, match="Convert the original again"):
            original_layers(file, fit_lora(file).layers)
