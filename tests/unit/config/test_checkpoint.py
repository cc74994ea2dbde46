"""Checkpoints by their header alone: official sizes, every container, every kind, and files that lie."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from backend.config.checkpoint import (
    KNOWN_ARCHITECTURES,
    TransformerConfig,
    compare_with_task,
    identify,
    read_header,
)
from backend.config.tasks import DEMO_WEIGHTS
from backend.errors import UserError
from tests.unit.config.headers import header_of, write_header_only, write_raw

PRO, LITE, DEMO = (KNOWN_ARCHITECTURES[name] for name in ("pro", "lite", "demo"))


def _config_json(folder: Path, config: TransformerConfig, **changes: Any) -> None:
    values = {"_class_name": "Kandinsky5Transformer3DModel", **asdict(config), **changes}
    (folder / "config.json").write_text(json.dumps(values))


def _sharded(folder: Path, config: TransformerConfig, shards: int = 3) -> Path:
    tensors = config.expected_tensors()
    weight_map: dict[str, str] = {}
    for index in range(shards):
        name = f"diffusion_pytorch_model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        write_header_only(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _config_json(folder, config)
    return folder


def test_no_torch_is_imported() -> None:
    """The app uses this module, and the app never imports torch."""
    code = "import sys, backend.config.checkpoint; sys.exit(any(m in sys.modules for m in ('torch', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "count", "parameters", "words"),
    [
        ("pro", 1514, 19_311_325_248, "Kandinsky 5 Pro DiT, 19.31 B parameters, bf16, 33 input channels"),
        ("lite", 814, 2_007_702_848, "Kandinsky 5 Lite DiT, 2.01 B parameters, bf16, 33 input channels"),
        ("image_lite", 1246, 6_022_080_576, "images only), 6.02 B parameters, bf16, 16 input channels"),
        ("image_lite_edit", 1246, 6_022_254_656, "for editing (images only)"),
    ],
)
def test_official_sizes(name: str, count: int, parameters: int, words: str, tmp_path: Path) -> None:
    """The real shapes in a header with a sparse data area: 38 GB that take no disk."""
    path = write_header_only(tmp_path / "dit.safetensors", KNOWN_ARCHITECTURES[name].expected_tensors())
    info = identify(path)
    assert (info.kind, info.architecture, info.dtype, info.prefix) == ("dit", name, "bf16", "")
    assert info.config == KNOWN_ARCHITECTURES[name]
    assert len(info.header.tensors) == len(info.key_map) == count
    assert info.parameters == parameters
    assert words in info.summary
    assert info.unsupported is None
    assert info.header.total_bytes == path.stat().st_size > 2 * parameters
    assert path.stat().st_blocks * 512 < 4_000_000


def test_demo_weights() -> None:
    """The embedded model in all three ways to name it."""
    for path in (
        DEMO_WEIGHTS,
        DEMO_WEIGHTS / "transformer",
        next((DEMO_WEIGHTS / "transformer").glob("*.safetensors")),
    ):
        info = identify(path)
        assert (info.kind, info.architecture, info.config) == ("dit", "demo", DEMO)
        assert (info.dtype, info.layout) == ("fp16", "diffusers")
    assert identify(DEMO_WEIGHTS / "text_encoder").kind == "text_encoder"
    assert identify(DEMO_WEIGHTS / "text_encoder_2").kind == "clip"


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "module.diffusion_model."]
)
def test_prefixes_are_stripped(prefix: str, tmp_path: Path) -> None:
    """The map leads from official names to those in the file."""
    tensors = {f"{prefix}{name}": shape for name, shape in LITE.expected_tensors().items()}
    info = identify(write_header_only(tmp_path / "repack.safetensors", tensors))
    assert (info.architecture, info.prefix) == ("lite", prefix)
    assert set(info.key_map) == set(LITE.expected_tensors())
    assert info.key_map["out_layer.out_layer.bias"] == f"{prefix}out_layer.out_layer.bias"


def test_unknown_prefixes_are_no_dit(tmp_path: Path) -> None:
    """A name that merely ends like ours."""
    tensors = {f"other.{name}": shape for name, shape in DEMO.expected_tensors().items()}
    assert identify(write_header_only(tmp_path / "x.safetensors", tensors)).kind == "unknown"


def test_diffusers_folders(tmp_path: Path) -> None:
    """Sharded, as the transformer of a pipeline, and by its index."""
    folder = _sharded(tmp_path / "model" / "transformer", LITE)
    for path in (folder, folder.parent, folder / "diffusion_pytorch_model.safetensors.index.json"):
        info = identify(path)
        assert (info.architecture, info.parameters) == ("lite", 2_007_702_848)
        assert len(info.header.paths) == 3


def test_custom_sizes(tmp_path: Path) -> None:
    """Any size of the family; rotary axes of unusual heads come from config.json, and nowhere else."""
    config = replace(DEMO, model_dim=96, axes_dims=(8, 12, 12), num_visual_blocks=1)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    write_header_only(file, config.expected_tensors())
    info = identify(file)
    assert (info.kind, info.architecture, info.config) == ("dit", "custom", None)
    assert "heads of 32" in (info.unsupported or "")
    assert compare_with_task(info, DEMO) == [info.unsupported]
    _config_json(tmp_path, config)
    assert identify(tmp_path).config == config
    assert config.num_heads == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes_dims": [32, 48, 48]}, "do not make heads of 64"),
        ({"axes_dims": [15, 25, 24]}, "do not make heads of 64"),
        ({"axes_dims": "16,24,24"}, "not three whole numbers"),
        ({"patch_size": [1, 2, 0]}, "not three whole numbers"),
        ({"num_visual_blocks": 6}, "num_visual_blocks is 6 in config.json and 5 in the weights"),
        ({"visual_cond": False}, "visual_cond is False"),
        ({"_class_name": "FluxTransformer2DModel"}, "does not belong to a Kandinsky 5 DiT"),
    ],
)
def test_config_json_must_agree(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A config.json of another model, or a damaged one."""
    write_header_only(tmp_path / "diffusion_pytorch_model.safetensors", DEMO.expected_tensors())
    _config_json(tmp_path, DEMO, **changes)
    with pytest.raises(UserError, match=words):
        identify(tmp_path)


def test_config_json_that_is_no_json(tmp_path: Path) -> None:
    """Also when it is deeply nested or long."""
    write_header_only(tmp_path / "diffusion_pytorch_model.safetensors", DEMO.expected_tensors())
    for text in ("{", "[" * 200_000, " " * 1_000_001, "\udcff"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(UserError, match="config"):
            identify(tmp_path)


def test_a_foreign_config_json_beside_an_official_file_is_ignored(tmp_path: Path) -> None:
    """Only diffusers' own file names belong to the config.json beside them."""
    write_header_only(tmp_path / "kandinsky5lite.safetensors", LITE.expected_tensors())
    _config_json(tmp_path, PRO)
    assert identify(tmp_path / "kandinsky5lite.safetensors").architecture == "lite"


def test_comparison_with_a_task(tmp_path: Path) -> None:
    """Empty when it fits, else rows of expected and found; image models are refused by name."""
    lite = identify(write_header_only(tmp_path / "lite.safetensors", LITE.expected_tensors()))
    image = identify(
        write_header_only(tmp_path / "image.safetensors", KNOWN_ARCHITECTURES["image_lite"].expected_tensors())
    )
    vae = identify(write_header_only(tmp_path / "vae.safetensors", {"decoder.conv_in.conv.weight": (2,)}))
    assert compare_with_task(lite, LITE) == []
    rows = compare_with_task(lite, PRO)
    assert rows[0] == "model: expected Kandinsky 5 Pro DiT, found Kandinsky 5 Lite DiT"
    assert "time_dim: expected 1024, found 512" in rows
    assert "axes_dims: expected (32, 48, 48), found (16, 24, 24)" in rows
    assert "images only" in compare_with_task(image, PRO)[0]
    assert "visual_cond: expected True, found False" in compare_with_task(image, PRO)
    assert len(compare_with_task(vae, PRO)) == 1


@pytest.mark.parametrize(
    ("names", "kind", "layout", "words"),
    [
        (
            ["encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.up_blocks.0.x"],
            "vae",
            "diffusers",
            "",
        ),
        (["decoder.conv_in.conv.weight", "decoder.up.0.block.0.x"], "vae", "original", "HunyuanVideo"),
        (["vae.decoder.conv_in.conv.weight", "vae.decoder.up_blocks.0.x"], "vae", "diffusers", "HunyuanVideo"),
        (["decoder.conv_in.weight", "decoder.up_blocks.0.x"], "vae", "image", "not the HunyuanVideo one"),
        (
            ["model.layers.0.self_attn.q_proj.weight", "visual.patch_embed.proj.weight"],
            "text_encoder",
            "vision",
            "Qwen",
        ),
        (["model.language_model.layers.0.self_attn.q_proj.weight"], "text_encoder", "text", "Qwen"),
        (["text_model.embeddings.position_embedding.weight"], "clip", "transformers", "CLIP"),
        (
            ["embeddings.position_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"],
            "clip",
            "transformers",
            "",
        ),
        (["lora_unet_visual_transformer_blocks_0_self_attention_to_query.lora_down.weight"], "lora", "kohya", "kohya"),
        (["transformer.visual_transformer_blocks.0.x.lora_A.weight"], "lora", "peft", "PEFT"),
        (["diffusion_model.visual_transformer_blocks.0.x.lora_B.weight"], "lora", "comfyui", "ComfyUI"),
        (["something.weight"], "unknown", "", "unknown"),
    ],
)
def test_other_kinds(names: list[str], kind: str, layout: str, words: str, tmp_path: Path) -> None:
    """What else people give as a DiT is named."""
    info = identify(write_header_only(tmp_path / "x.safetensors", dict.fromkeys(names, (2, 3))))
    assert (info.kind, info.layout, info.architecture) == (kind, layout, None)
    assert words in info.summary
    assert info.parameters == 6 * len(names)


@pytest.mark.parametrize("how", ["scale_weight", "dtype"])
def test_fp8_repacks_are_recognised(how: str, tmp_path: Path) -> None:
    """Named, with the sentence that says what to use instead."""
    tensors = DEMO.expected_tensors()
    if how == "dtype":
        path = write_header_only(tmp_path / "fp8.safetensors", tensors, "F8_E4M3", 8)
    else:
        scales = {f"{name[:-6]}scale_weight": (1,) for name in tensors if name.endswith("to_query.weight")}
        path = write_header_only(tmp_path / "fp8.safetensors", {**tensors, **scales})
    info = identify(path)
    assert info.kind == "dit"
    assert "fp8 repack" in info.summary
    assert "bf16 checkpoint" in (info.unsupported or "")
    assert info.parameters == 3_976_640


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_layer.out_layer.weight": None}, "out_layer.out_layer.weight is missing"),
        ({"time_embeddings.in_layer.weight": (4, 5, 6)}, r"shape \[4, 5, 6\]"),
        ({"visual_transformer_blocks.9.x": (1,)}, "visual blocks are missing"),
        ({"text_transformer_blocks.999999.x": (1,)}, "text blocks are missing"),
        ({"visual_transformer_blocks.0.feed_forward.in_layer.weight": (0, 192)}, r"shape \[0, 192\]"),
        ({"visual_transformer_blocks.0.self_attention.query_norm.weight": (128,)}, "does not divide into heads of 128"),
    ],
)
def test_dits_that_contradict_themselves(
    changes: dict[str, tuple[int, ...] | None], words: str, tmp_path: Path
) -> None:
    """Tensors missing or of shapes that no DiT has."""
    tensors = {**DEMO.expected_tensors(), **changes}
    path = tmp_path / "x.safetensors"
    write_header_only(path, {name: shape for name, shape in tensors.items() if shape is not None})
    with pytest.raises(UserError, match=words):
        identify(path)


@pytest.mark.parametrize(
    ("columns", "words"), [(133, "patch embedding of 133"), (4 * 20, "20 input channels for 16 output")]
)
def test_unknown_channels(columns: int, words: str, tmp_path: Path) -> None:
    """Recognised as a DiT, but one that nobody knows how to feed."""
    tensors = {**DEMO.expected_tensors(), "visual_embeddings.in_layer.weight": (192, columns)}
    info = identify(write_header_only(tmp_path / "x.safetensors", tensors))
    assert info.config is None
    assert words in (info.unsupported or "")


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


HOSTILE: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "not json": (lambda: b"{nonsense", 24, "not valid JSON"),
    "not utf-8": (lambda: b'{"\xff\xfe": 1}', 24, "not valid JSON"),
    "nested": (lambda: b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", 24, "not valid JSON"),
    "long number": (lambda: b'{"a":' + b"9" * 10_000 + b"}", 24, "not valid JSON"),
    "a list": (lambda: b"[1, 2]", 24, "not a table"),
    "no tensors": (lambda: b'{"__metadata__": {}}', 0, "holds no tensors"),
    "duplicate": (lambda: b'{"a": 1, "a": 2}', 24, "lists 'a' twice"),
    "no table": (lambda: b'{"a": 5}', 24, "not a table"),
    "metadata": (lambda: json.dumps({"__metadata__": {"a": 1}, "w": _entry()}).encode(), 24, "metadata"),
    "unknown dtype": (lambda: json.dumps({"w": _entry(dtype="F12")}).encode(), 24, "number format F12"),
    "dtype list": (lambda: json.dumps({"w": _entry(dtype=["F32"])}).encode(), 24, "number format"),
    "negative": (lambda: json.dumps({"w": _entry(shape=[-2, -3])}).encode(), 24, "impossible shape"),
    "true": (lambda: json.dumps({"w": _entry(shape=[True, 6])}).encode(), 24, "impossible shape"),
    "fraction": (lambda: json.dumps({"w": _entry(shape=[1.5, 4])}).encode(), 24, "impossible shape"),
    "huge side": (lambda: json.dumps({"w": _entry(shape=[1 << 70])}).encode(), 24, "impossible shape"),
    "many sides": (lambda: json.dumps({"w": _entry(shape=[1] * 99)}).encode(), 24, "impossible shape"),
    "one offset": (lambda: json.dumps({"w": _entry(data_offsets=[0])}).encode(), 24, "impossible offsets"),
    "negative offset": (lambda: json.dumps({"w": _entry(data_offsets=[-24, 0])}).encode(), 24, "impossible offsets"),
    "backwards": (lambda: json.dumps({"w": _entry(data_offsets=[24, 0])}).encode(), 24, "size of its shape"),
    "wrong size": (lambda: json.dumps({"w": _entry(dtype="F16")}).encode(), 24, "size of its shape"),
    "hole": (lambda: json.dumps({"w": _entry(data_offsets=[8, 32])}).encode(), 32, "leaves a gap"),
    "overlap": (lambda: json.dumps({"v": _entry(), "w": _entry(data_offsets=[12, 36])}).encode(), 36, "overlaps"),
    "twice the same": (lambda: json.dumps({"v": _entry(), "w": _entry()}).encode(), 24, "overlaps"),
    "too long": (lambda: json.dumps({"w": _entry()}).encode(), 25, "after its last tensor"),
    "too short": (lambda: json.dumps({"w": _entry()}).encode(), 23, "download is incomplete"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    """One sentence for each, with exit code 2 and the path."""
    header, size, words = HOSTILE[name]
    path = write_raw(tmp_path / "x.safetensors", header(), size)
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"12345", "too short"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims a header"),
        (struct.pack("<Q", 100_000_001) + b"{}", "claims a header"),
        (struct.pack("<Q", 50) + b"{}", "ends inside its header"),
        (b"PK\x03\x04" + bytes(100), "pickle checkpoint: only .safetensors"),
        (b"\x80\x02}q\x00" + bytes(100), "pickle checkpoint"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_files_that_are_something_else(content: bytes, words: str, tmp_path: Path) -> None:
    """Other formats are named, whatever they are called."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_header(path)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin"])
def test_pickles_by_their_name(suffix: str, tmp_path: Path) -> None:
    """Old pickles begin with any byte; the name is enough."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"(dp0\n" * 20)
    with pytest.raises(UserError, match="can run code"):
        read_header(path)


@pytest.mark.parametrize("length", [0x80, 0x0280], ids=["pickle 0", "pickle 2"])
def test_header_lengths_that_look_like_other_formats(length: int, tmp_path: Path) -> None:
    """A header of 128 or 640 bytes begins with the bytes of a pickle."""
    raw = json.dumps({"w": _entry()}).encode().ljust(length)
    assert read_header(write_raw(tmp_path / "x.safetensors", raw, 24)).tensors["w"].shape == (2, 3)


def test_damaged_headers_never_escape(tmp_path: Path) -> None:
    """Random bytes changed, cut and repeated: a header is read, or one sentence says why not."""
    source = random.Random(5)
    tensors = {"visual_embeddings.in_layer.weight": (4, 8), "time_embeddings.in_layer.weight": (3, 4), "b": (7,)}
    whole = write_header_only(tmp_path / "whole.safetensors", tensors).read_bytes()
    path = tmp_path / "x.safetensors"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(whole) - 90)
            damaged[place] = source.choice([source.randrange(256), *b'"{}[]:,0-e'])
        if source.random() < 0.2:
            damaged = damaged[: source.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            identify(path)
        except UserError:
            refused += 1
    assert refused > 200


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    """Missing, empty, ambiguous, and no file at all."""
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        read_header(tmp_path)
    write_header_only(tmp_path / "a.safetensors", {"w": (1,)})
    assert read_header(tmp_path).paths == (tmp_path / "a.safetensors",)
    write_header_only(tmp_path / "b.safetensors", {"w": (1,)})
    with pytest.raises(UserError, match=r"several checkpoints \(a.safetensors, b.safetensors\)"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        read_header("/dev/null")


def _index(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "..", "", 5]
)
def test_an_index_that_leaves_its_folder(shard: object, tmp_path: Path) -> None:
    """Such an index is not followed, even when the file exists."""
    write_header_only(tmp_path / "outside.safetensors", {"w": (1,)})
    folder = tmp_path / "model"
    folder.mkdir()
    _index(folder).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(UserError, match="outside its own folder"):
        read_header(folder)


def test_shards_that_do_not_match_their_index(tmp_path: Path) -> None:
    """Missing shards, tensors that are elsewhere, tensors that the index does not know, and damaged indexes."""
    folder = _sharded(tmp_path, DEMO)
    parsed = json.loads(_index(folder).read_text())
    moved = dict(parsed["weight_map"])
    first, *_, second = moved
    moved[first] = moved[second]
    for weight_map, words in (
        (moved, f"holds {first}, but it does not"),
        ({name: shard for name, shard in parsed["weight_map"].items() if name != first}, "does not list"),
        ({**parsed["weight_map"], "extra": parsed["weight_map"][first]}, "holds extra, but it does not"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ):
        _index(folder).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=words):
            read_header(folder)
    _index(folder).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_header(folder)
    _index(folder).write_text(json.dumps(parsed))
    (folder / moved[second]).unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards"):
        read_header(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which one would count? Neither."""
    for name in ("model-1.safetensors", "model-2.safetensors"):
        write_header_only(tmp_path / name, {"w": (1,)})
    (tmp_path / "more.safetensors").write_bytes(b"")
    weight_map = {"w": "model-1.safetensors", "v": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="repeats w"):
        read_header(tmp_path)


def test_symbolic_links_of_a_hub_cache(tmp_path: Path) -> None:
    """A snapshot of the hub's cache is a folder of links to blobs elsewhere."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    _sharded(blobs, DEMO)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert identify(snapshot).architecture == "demo"


def test_header_says_what_is_in_the_file(tmp_path: Path) -> None:
    """Formats, shapes, metadata; padding after the JSON is allowed, and tensors may be empty or scalars."""
    header = header_of({"a": (2, 3), "b": (), "c": (0, 5)}, "F32", 32)
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode() + b"   "
    found = read_header(write_raw(tmp_path / "x.safetensors", raw, 28))
    assert found.metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {"a": (2, 3), "b": (), "c": (0, 5)}
    assert [tensor.elements for tensor in found.tensors.values()] == [6, 1, 0]
    assert found.tensors["a"].file == tmp_path / "x.safetensors"
