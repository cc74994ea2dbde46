"""Loading: every container gives the same model, and everything that is not exactly right is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backend.config.checkpoint import KNOWN_ARCHITECTURES, TransformerConfig
from backend.config.tasks import DEMO_WEIGHTS
from backend.errors import UserError
from backend.model import load
from backend.model.load import load_transformer
from tests.unit.config.headers import write_header_only
from tests.unit.model.helpers import (
    SMALL_HEADS,
    build,
    inputs,
    random_weights,
    relative,
    write_config,
    write_sharded,
)

CONFIG = SMALL_HEADS


def _save(path: Path, changes: dict[str, torch.Tensor | None] | None = None, prefix: str = "") -> Path:
    """The random weights in one file; a change of None removes a tensor."""
    weights = {**random_weights(CONFIG), **(changes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.items() if tensor is not None}, path)
    return path


def _container(kind: str, folder: Path) -> Path:
    if kind == "official file":
        return _save(folder / "kandinsky5.safetensors")
    if kind == "diffusers folder":
        _save(folder / "diffusion_pytorch_model.safetensors")
        write_config(folder, CONFIG)
        return folder
    if kind == "sharded folder":
        write_sharded(folder, random_weights(CONFIG), CONFIG)
        return folder
    if kind == "index file":
        write_sharded(folder, random_weights(CONFIG), CONFIG)
        return folder / "diffusion_pytorch_model.safetensors.index.json"
    if kind == "pipeline folder":
        write_sharded(folder / "transformer", random_weights(CONFIG), CONFIG)
        save_file({"decoder.conv_in.conv.weight": torch.zeros(1)}, folder / "diffusers_vae.safetensors.part")
        return folder
    return _save(folder / "repack.safetensors", prefix=kind)


@pytest.mark.parametrize(
    "kind",
    [
        "official file",
        "diffusers folder",
        "sharded folder",
        "index file",
        "pipeline folder",
        "model.diffusion_model.",
        "diffusion_model.",
        "transformer.",
        "module.",
        "module.transformer.",
    ],
)
def test_every_container_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    """Bit for bit the output of the model that the weights came from."""
    arguments = inputs(CONFIG, 1, (2, 4, 6), 5, seed=1)
    model = load_transformer(_container(kind, tmp_path), task_config=CONFIG)
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        assert torch.equal(model(**arguments), build(CONFIG)(**arguments))


def test_diffusers_writes_what_is_loaded(tmp_path: Path) -> None:
    """A folder saved by diffusers itself, sharded by diffusers."""
    from tests.unit.model.helpers import build_diffusers

    build_diffusers(CONFIG).save_pretrained(tmp_path, max_shard_size="600KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    arguments = inputs(CONFIG, 1, (2, 4, 6), 5, seed=1)
    with torch.no_grad():
        assert torch.equal(load_transformer(tmp_path)(**arguments), build(CONFIG)(**arguments))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_source_formats(source: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors are cast once, each to its place in the policy; islands get the file's exact values."""
    weights = {name: tensor.to(source) for name, tensor in random_weights(CONFIG).items()}
    save_file(weights, tmp_path / "dit.safetensors")
    model = load_transformer(tmp_path / "dit.safetensors", dtype=dtype)
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        assert parameter.dtype == model.policy_dtypes(dtype)[name]
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name


def test_demo_weights_load_for_their_task() -> None:
    """The embedded model, by the folder that the demo tasks name."""
    model = load_transformer(DEMO_WEIGHTS / "transformer", task_config=KNOWN_ARCHITECTURES["demo"])
    arguments = inputs(model.config, 1, (5, 8, 8), 12, seed=2)
    with torch.no_grad():
        assert model(**arguments).isfinite().all()


def test_the_file_may_change_after_loading(tmp_path: Path) -> None:
    """The model owns its weights: it does not map the file."""
    path = _save(tmp_path / "dit.safetensors")
    model = load_transformer(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tensors_are_streamed_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap B16: never the model and the whole file; beside the model at most two source tensors are alive."""
    import weakref

    sources: list[weakref.ref] = []
    most = 0
    original = load._assign

    def watching(model, name, tensor):
        nonlocal most
        original(model, name, tensor)
        most = max(most, sum(reference() is not None for reference in sources))

    stream = load._stream

    def recorded(info):
        for name, tensor in stream(info):
            sources.append(weakref.ref(tensor))
            yield name, tensor

    monkeypatch.setattr(load, "_assign", watching)
    monkeypatch.setattr(load, "_stream", recorded)
    load_transformer(_save(tmp_path / "dit.safetensors"))
    assert len(sources) == len(CONFIG.expected_tensors())
    assert most <= 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_layer.out_layer.bias": None}, r"1 missing \(out_layer\.out_layer\.bias\)"),
        ({"extra.weight": torch.zeros(2)}, r"1 unexpected \(extra\.weight\)"),
        ({"text_embeddings.norm.weight": torch.ones(7)}, r"expected \[128\], found \[7\]"),
        ({"text_embeddings.norm.weight": torch.ones(128, dtype=torch.int8)}, "number format"),
    ],
)
def test_keys_and_shapes_are_strict(changes: dict, words: str, tmp_path: Path) -> None:
    """Trap B16: musubi loads with strict=False and only logs."""
    with pytest.raises(UserError, match=words):
        load_transformer(_save(tmp_path / "dit.safetensors", changes))


def test_long_lists_are_cut(tmp_path: Path) -> None:
    """Ten names, and how many more."""
    changes = {f"extra.{index}": torch.zeros(1) for index in range(14)}
    with pytest.raises(UserError, match=r"14 unexpected .* and 4 more"):
        load_transformer(_save(tmp_path / "dit.safetensors", changes))


def test_other_tensors_beside_a_prefix_are_unexpected(tmp_path: Path) -> None:
    """A repack with a VAE in it is not silently half loaded."""
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in random_weights(CONFIG).items()}
    save_file({**weights, "first_stage_model.quant_conv.weight": torch.zeros(1)}, tmp_path / "all.safetensors")
    with pytest.raises(UserError, match="1 unexpected"):
        load_transformer(tmp_path / "all.safetensors")


def test_a_lite_checkpoint_for_a_pro_task(tmp_path: Path) -> None:
    """Trap B16: a table of expected and found, before any weight is read."""
    path = tmp_path / "lite.safetensors"
    write_header_only(path, KNOWN_ARCHITECTURES["lite"].expected_tensors())
    with pytest.raises(UserError) as caught:
        load_transformer(path, task_config=KNOWN_ARCHITECTURES["pro"])
    message = str(caught.value)
    assert "expected Kandinsky 5 Pro DiT, found Kandinsky 5 Lite DiT" in message
    assert "model_dim: expected 4096, found 1792" in message
    assert "num_visual_blocks: expected 60, found 32" in message
    assert caught.value.exit_code == 2


def test_other_models_are_named(tmp_path: Path) -> None:
    """A VAE, a LoRA, an fp8 repack and an image model each get their own sentence."""
    vae, lora, fp8, image = (tmp_path / f"{name}.safetensors" for name in ("vae", "lora", "fp8", "image"))
    save_file({"decoder.conv_in.conv.weight": torch.zeros(2), "decoder.up_blocks.0.x": torch.zeros(1)}, vae)
    save_file({"lora_unet_visual_transformer_blocks_0.lora_down.weight": torch.zeros(2)}, lora)
    weights = dict(random_weights(CONFIG))
    scales = {f"{name[:-6]}scale_weight": torch.ones(1) for name in weights if name.endswith("in_layer.weight")}
    save_file({**weights, **scales}, fp8)
    write_header_only(image, KNOWN_ARCHITECTURES["image_lite"].expected_tensors())
    for path, words in ((vae, "HunyuanVideo VAE"), (lora, "LoRA"), (fp8, "fp8 repack"), (image, "images only")):
        with pytest.raises(UserError, match=words):
            load_transformer(path, task_config=KNOWN_ARCHITECTURES["pro"])


def test_damage_is_found(tmp_path: Path) -> None:
    """A truncated file and a lying header give one sentence, not a traceback."""
    path = _save(tmp_path / "dit.safetensors")
    whole = path.read_bytes()
    for cut in (0, 5, 9, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            load_transformer(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="after its last tensor"):
        load_transformer(path)


def test_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    """The config.json of another model beside the weights."""
    _save(tmp_path / "diffusion_pytorch_model.safetensors")
    write_config(tmp_path, replace(CONFIG, ff_dim=999))
    with pytest.raises(UserError, match=r"ff_dim is 999 in config\.json and 192 in the weights"):
        load_transformer(tmp_path)


def test_axes_come_from_config_json(tmp_path: Path) -> None:
    """What shapes do not show is read from the config.json, for any head size."""
    config = replace(CONFIG, axes_dims=(8, 12, 12))
    save_file(random_weights(config), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="heads of 32"):
        load_transformer(tmp_path)
    write_config(tmp_path, config)
    model = load_transformer(tmp_path)
    arguments = inputs(config, 1, (2, 4, 6), 5, seed=3)
    with torch.no_grad():
        assert relative(model(**arguments), build(config)(**arguments)) == 0


def test_arguments_are_checked(tmp_path: Path) -> None:
    """Formats and attention backends that cannot serve."""
    path = _save(tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match="float32 or bfloat16"):
        load_transformer(path, dtype=torch.float16)
    with pytest.raises(UserError, match="not an attention backend"):
        load_transformer(path, attention="magic")
    with pytest.raises(UserError, match="does not exist"):
        load_transformer(tmp_path / "nothing.safetensors")
    assert json.dumps(load_transformer(path, attention="sdpa", rope_bf16_rounding=True).config.axes_dims)
    assert isinstance(load_transformer(path).config, TransformerConfig)
