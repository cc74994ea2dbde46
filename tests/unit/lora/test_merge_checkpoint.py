"""LoRAs merged into checkpoints on disk: every container, against float64 arithmetic, streaming, whole or absent."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backend.config.checkpoint import identify
from backend.errors import UserError
from backend.lora import merge_checkpoint as module
from backend.lora.formats import LoraWeights, write_lora
from backend.lora.merge_checkpoint import merge_checkpoint
from backend.model.load import load_transformer
from tests.unit.lora.models import block_layers, random_lora, skeleton
from tests.unit.model.helpers import SMALL_HEADS, random_weights

SHARDS = 3


@pytest.fixture
def loras(tmp_path: Path) -> list[tuple[Path, float, dict[str, LoraWeights]]]:
    model = skeleton(SMALL_HEADS)
    first = random_lora(model, rank=4, alpha=2.0, seed=1)
    second = random_lora(model, block_layers(model)[::3], rank=2, alpha=4.0, seed=2)
    found = []
    for name, lora, strength in (("first", first, 0.8), ("second", second, -0.5)):
        write_lora(tmp_path / f"{name}.safetensors", lora)
        found.append((tmp_path / f"{name}.safetensors", strength, lora))
    return found


def _single(folder: Path, dtype: torch.dtype = torch.float32, prefix: str = "", **extra: torch.Tensor) -> Path:
    tensors = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in random_weights(SMALL_HEADS).items()}
    save_file(tensors | extra, folder / "dit.safetensors", {"format": "pt", "note": "kept"})
    return folder / "dit.safetensors"


def _sharded(folder: Path) -> Path:
    folder = folder / "sharded"
    folder.mkdir()
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-{index + 1:05d}-of-{SHARDS:05d}.safetensors" for index in range(SHARDS)]
    parts: list[dict[str, torch.Tensor]] = [{} for _ in names]
    for index, (name, tensor) in enumerate(random_weights(SMALL_HEADS).items()):
        parts[index % SHARDS][name] = tensor.bfloat16()
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "Kandinsky5Transformer3DModel"}))
    return folder


def _expected(name: str, weight: torch.Tensor, loras: list[tuple[Path, float, dict[str, LoraWeights]]]) -> torch.Tensor:
    total = weight.double()
    for _, strength, lora in loras:
        pair = lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is not None:
            total = total + strength * pair.alpha / pair.rank * (pair.up.double() @ pair.down.double())
    return total


def _check(found: dict[str, torch.Tensor], base: dict[str, torch.Tensor], loras: list, dtype: torch.dtype) -> None:
    changed = {name for _, _, lora in loras for name in lora}
    assert set(found) == set(base)
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        if name.removesuffix(".weight") not in changed or name.endswith(".bias"):
            assert torch.equal(tensor, base[name].to(dtype)), name
            continue
        exact = _expected(name, base[name], loras)
        if dtype == torch.float32:
            assert torch.allclose(tensor.double(), exact, rtol=1e-5, atol=1e-6), name
        else:
            assert float((tensor == exact.to(dtype)).double().mean()) > 0.99, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_file_keeps_format_names_and_metadata(tmp_path: Path, loras: list, dtype: torch.dtype) -> None:
    dit = _single(tmp_path, dtype)
    output = tmp_path / "out" / "merged.safetensors"
    assert merge_checkpoint(dit, [(path, strength) for path, strength, _ in loras], output) == [output]
    _check(load_file(output), load_file(dit), loras, dtype)
    with safe_open(output, "pt") as handle:
        metadata = handle.metadata()
    assert metadata["note"] == "kept"
    assert [entry["strength"] for entry in json.loads(metadata["k5_merged_loras"])] == [0.8, -0.5]
    assert [path.name for path in output.parent.iterdir()] == ["merged.safetensors"]
    if dtype != torch.float16:
        load_transformer(output, dtype=dtype)


def test_a_prefixed_repack_keeps_its_prefix_and_what_else_it_holds(tmp_path: Path, loras: list) -> None:
    extra = torch.arange(5)
    dit = _single(tmp_path, prefix="model.diffusion_model.", other=extra)
    output = tmp_path / "merged.safetensors"
    merge_checkpoint(dit, [(loras[0][0], 0.8)], output)
    found = load_file(output)
    assert torch.equal(found.pop("other"), extra)
    stripped = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in found.items()}
    assert len(stripped) == len(found)
    _check(stripped, random_weights(SMALL_HEADS), loras[:1], torch.float32)


def test_a_sharded_folder_stays_one_or_becomes_one_file(tmp_path: Path, loras: list) -> None:
    dit = _sharded(tmp_path)
    base = {name: tensor for path in dit.glob("*.safetensors") for name, tensor in load_file(path).items()}
    pairs = [(path, strength) for path, strength, _ in loras]
    files = merge_checkpoint(dit, pairs, tmp_path / "merged")
    assert sorted(path.name for path in files) == sorted(path.name for path in dit.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for path in files:
        part = load_file(path)
        assert set(part) == set(load_file(dit / path.name))
        found |= part
    _check(found, base, loras, torch.bfloat16)
    assert identify(tmp_path / "merged").architecture == "custom"
    assert (tmp_path / "merged" / "config.json").read_bytes() == (dit / "config.json").read_bytes()
    index = json.loads((tmp_path / "merged" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in base.values())
    merge_checkpoint(dit, pairs, tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")
    assert set(one) == set(found)
    assert all(torch.equal(one[name], tensor) for name, tensor in found.items())


def test_another_precision_is_one_rounding_of_the_exact_sum(tmp_path: Path, loras: list) -> None:
    dit = _single(tmp_path)
    merge_checkpoint(dit, [(path, strength) for path, strength, _ in loras], tmp_path / "m.safetensors", "bf16")
    _check(load_file(tmp_path / "m.safetensors"), load_file(dit), loras, torch.bfloat16)


@pytest.mark.parametrize("trouble", ["fp8", "scaled", "no dit", "other lora", "overflow", "missing layer"])
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path: Path, loras: list, trouble: str) -> None:
    """Traps T8 and B11 again: 8-bit codes are refused, with and without scales."""
    path, precision = loras[0][0], None
    # Copies: the random weights are shared by all tests of a run.
    weights = {name: tensor.clone() for name, tensor in random_weights(SMALL_HEADS).items()}
    key = "visual_transformer_blocks.0.self_attention.to_query.weight"
    if trouble == "fp8":
        weights[key] = weights[key].to(torch.float8_e4m3fn)
    if trouble == "scaled":
        weights[key.replace("weight", "scale_weight")] = torch.ones(1)
    if trouble == "overflow":
        weights[key][0, 0], precision = 1e9, "fp16"
    if trouble == "missing layer":
        del weights[key.replace("to_query", "to_key")]
    if trouble == "no dit":
        weights = {"decoder.conv_in.conv.weight": torch.ones(2)}
    if trouble == "other lora":
        write_lora(tmp_path / "other.safetensors", random_lora(skeleton()))
        path = tmp_path / "other.safetensors"
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    save_file(weights, tmp_path / "dit.safetensors")
    expected = {
        "fp8": "quantised", "scaled": "quantised", "no dit": "not a Kandinsky 5 DiT", "other lora": "made for",
        "overflow": "Use bf16 or fp32", "missing layer": "incomplete",
    }[trouble]  # fmt: skip
    with pytest.raises(UserError, match=expected):
        merge_checkpoint(tmp_path / "dit.safetensors", [(path, 1.0)], tmp_path / "out" / "m.safetensors", precision)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("shards", [False, True])
def test_a_failure_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, loras: list, monkeypatch: pytest.MonkeyPatch, shards: bool
) -> None:
    dit = _sharded(tmp_path) if shards else _single(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    calls = 0

    def failing(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    original = module._result
    monkeypatch.setattr(module, "_result", failing)
    with pytest.raises(UserError, match="No space is left"):
        merge_checkpoint(dit, [(loras[0][0], 1.0)], tmp_path / ("m" if shards else "m.safetensors"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_memory_is_that_of_a_few_tensors_and_not_of_the_model(tmp_path: Path, loras: list) -> None:
    """A checkpoint of 268 MB beside the DiT's own tensors; the pages that the input is mapped to are not ours."""
    big = {f"other.{index}": torch.ones(2**20) for index in range(64)}
    dit = _single(tmp_path, **big)
    del big
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    start = _anonymous()
    watcher.start()
    merge_checkpoint(dit, [(loras[0][0], 1.0)], tmp_path / "m.safetensors", "bf16")
    done.set()
    watcher.join()
    assert (tmp_path / "m.safetensors").stat().st_size > 134e6
    assert peak - start < 80e6, f"{(peak - start) / 1e6:.0f} MB"


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024
