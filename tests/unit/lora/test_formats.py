"""LoRA files: three spellings, round trips, where alpha comes from, and files that are refused with a reason."""

from __future__ import annotations

import json
import math
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.config.checkpoint import KNOWN_ARCHITECTURES, identify
from backend.errors import UserError
from backend.files import fingerprint
from backend.lora.formats import LoraWeights, read_lora, write_lora
from backend.lora.targets import linear_targets, resolve
from tests.unit.lora.models import TINY, random_lora, skeleton

QUERY = "visual_transformer_blocks.0.self_attention.to_query"
FORMATS = ("kohya", "diffusers", "comfyui")
WIDTH = TINY.model_dim


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def _pair(rank: int = 4, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, width), torch.randn(width, rank)


def _kohya(name: str = QUERY, rank: int = 4) -> dict[str, Tensor]:
    down, up = _pair(rank)
    stem = "lora_unet_" + name.replace(".", "_")
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_other_programs_may_read_a_lora_if_they_may_read_other_new_files(file: Path, mask: int) -> None:
    """The safetensors library writes files for their owner alone."""
    before = os.umask(mask)
    try:
        write_lora(file, random_lora(skeleton(), rank=2))
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(file: Path, file_format: str, dtype: torch.dtype) -> None:
    model = skeleton()
    lora = random_lora(model, rank=4, alpha=4.0 if file_format == "diffusers" else 2.5, dtype=dtype)
    write_lora(file, lora, file_format, {"ss_steps": "500", "k5_task": "k5-demo-t2v"})
    read = read_lora(file)
    assert read.format == file_format
    assert read.metadata["ss_steps"] == "500"
    assert read.metadata["k5_task"] == "k5-demo-t2v"
    assert read.metadata["ss_network_dim"] == "4"
    assert (read.rank, read.alpha) == (4, 4.0 if file_format == "diffusers" else 2.5)
    assert read.fingerprint == fingerprint(file)
    assert f"{len(lora)} layers" in read.summary
    resolved = resolve(read, linear_targets(model))
    assert set(resolved) == set(lora)
    for name, weights in lora.items():
        assert torch.equal(resolved[name].down, weights.down)
        assert torch.equal(resolved[name].up, weights.up)
        assert resolved[name].alpha == weights.alpha


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_difference_survives_any_conversion(file: Path, file_format: str) -> None:
    """alpha is inside `up` in a diffusers file; the product that counts is the same."""
    model = skeleton()
    lora = random_lora(model, rank=3, alpha=1.0)
    write_lora(file, lora, file_format)
    for name, weights in resolve(read_lora(file), linear_targets(model)).items():
        found = weights.alpha / weights.rank * weights.up.double() @ weights.down.double()
        expected = lora[name].alpha / lora[name].rank * lora[name].up.double() @ lora[name].down.double()
        assert (found - expected).norm() < 1e-6 * expected.norm(), name


def test_key_names_as_other_software_expects_them(tmp_path: Path) -> None:
    lora = random_lora(skeleton(), [QUERY])
    keys = {}
    for file_format in FORMATS:
        write_lora(tmp_path / f"{file_format}.safetensors", lora, file_format)
        keys[file_format] = sorted(load_file(tmp_path / f"{file_format}.safetensors"))
    stem = "lora_unet_visual_transformer_blocks_0_self_attention_to_query"
    assert keys["kohya"] == [f"{stem}.alpha", f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"]
    assert keys["diffusers"] == [f"transformer.{QUERY}.lora_A.weight", f"transformer.{QUERY}.lora_B.weight"]
    stem = f"diffusion_model.{QUERY}"
    assert keys["comfyui"] == [f"{stem}.alpha", f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
    assert identify(tmp_path / "kohya.safetensors").kind == "lora"


def test_names_with_underscores_come_from_the_model_and_are_never_guessed(file: Path) -> None:
    """Trap B25: `..._self_attention_out_layer` taken apart at every underscore matches nothing of this model."""
    model = skeleton()
    names = [name for name in linear_targets(model) if name.endswith(("attention.out_layer", "forward.in_layer"))]
    names += ["text_transformer_blocks.1.text_modulation.out_layer", "out_layer.modulation.out_layer"]
    write_lora(file, random_lora(model, names), "kohya")
    assert set(resolve(read_lora(file), linear_targets(model))) == set(names)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "transformer.",
        "base_model.model.",
        "base_model.model.transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
    ],
)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_dotted_names_with_all_usual_prefixes(file: Path, prefix: str, down: str, up: str) -> None:
    first, second = _pair()
    save_file({f"{prefix}{QUERY}.{down}": first, f"{prefix}{QUERY}.{up}": second}, file)
    resolved = resolve(read_lora(file), linear_targets(skeleton()))
    assert list(resolved) == [QUERY]
    assert torch.equal(resolved[QUERY].down, first)
    assert resolved[QUERY].alpha == 4.0


# --- alpha --------------------------------------------------------------------------------------------------------


def _peft(file: Path, rank: int = 4, metadata: dict[str, str] | None = None) -> None:
    down, up = _pair(rank)
    save_file({f"transformer.{QUERY}.lora_A.weight": down, f"transformer.{QUERY}.lora_B.weight": up}, file, metadata)


def _alpha_of(file: Path) -> float:
    return next(iter(read_lora(file).layers.values())).alpha


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4.0),
        ({"r": 4, "lora_alpha": 8}, 8.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 8.0 * math.sqrt(4)),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {QUERY: 3}}, 3.0),
        ({"r": 16, "rank_pattern": {"self_attention.to_query": 4}, "lora_alpha": 2}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_query": 1, "self_attention.to_query": 5}}, 5.0),
    ],
)
def test_alpha_from_a_peft_configuration(file: Path, settings: dict, expected: float) -> None:
    """In the file's metadata (diffusers) and in adapter_config.json beside it (PEFT); PEFT's rules."""
    _peft(file, metadata={"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})})
    assert _alpha_of(file) == expected
    _peft(file)
    (file.parent / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert _alpha_of(file) == expected


def test_kohya_alpha_beats_a_configuration_that_lies_beside_it(file: Path) -> None:
    save_file(_kohya(), file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"r": 99, "lora_alpha": 99}), encoding="utf-8")
    assert _alpha_of(file) == 2.0


def test_alpha_missing_or_zero_means_the_rank(file: Path) -> None:
    tensors = _kohya()
    key = next(key for key in tensors if key.endswith(".alpha"))
    save_file({**tensors, key: torch.tensor(0.0)}, file)
    assert _alpha_of(file) == 4.0
    del tensors[key]
    save_file(tensors, file)
    assert _alpha_of(file) == 4.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"r": 8, "lora_alpha": 8}', "rank 8"),
        ('{"r": 4, "alpha_pattern": {"to_nothing": 1}}', "to_nothing"),
        ('{"r": 4, "use_dora": true}', "DoRA"),
        ('{"r": "four"}', "must be a number"),
        ('{"lora_alpha": NaN}', "must be a number"),
        ('{"alpha_pattern": 3}', "must be a table"),
        ("[1]", "not a table"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_wrong_configuration_is_refused(file: Path, text: str, words: str) -> None:
    _peft(file)
    (file.parent / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        read_lora(file)
    assert caught.value.field == "lora_weight"


def test_a_peft_folder(tmp_path: Path) -> None:
    _peft(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 6}', encoding="utf-8")
    assert _alpha_of(tmp_path) == 6.0
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"0 \.safetensors files"):
        read_lora(tmp_path / "empty")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"transformer.{QUERY}.dora_scale", "DoRA"),
        (f"base_model.model.{QUERY}.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
        ("lora_unet_a.lokr_w1", "LoKr"),
        ("lora_unet_a.lora_mid.weight", "convolutions"),
        ("lora_unet_a.diff_b", "weight difference"),
        ("lora_unet_a.oft_blocks", "OFT"),
    ],
)
def test_other_methods_are_named_and_refused(file: Path, key: str, method: str) -> None:
    save_file({**_kohya(), key: torch.ones(3)}, file)
    with pytest.raises(UserError, match="not supported") as caught:
        read_lora(file)
    assert method in caught.value.message
    assert caught.value.field == "lora_weight"


def _half(tensors: dict[str, Tensor], ending: str) -> str:
    return next(key for key in tensors if key.endswith(ending))


def _without(ending: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[_half(tensors, ending)]

    return damage


def _with(ending: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({_half(tensors, ending): tensor})


def _with_two_spellings(tensors: dict[str, Tensor]) -> None:
    tensors[_half(tensors, "down.weight").replace("lora_down", "lora_A")] = torch.ones(4, WIDTH)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_without("up.weight"), "lora_up / lora_B half is missing"),
        (_without("down.weight"), "lora_down / lora_A half is missing"),
        (_with("up.weight", torch.ones(WIDTH, 5)), "ranks differ"),
        (_with("up.weight", torch.ones(WIDTH)), "not matrices"),
        (_with("down.weight", torch.ones(4, WIDTH, 1, 1)), "not matrices"),
        (_with("down.weight", torch.full((4, WIDTH), math.nan)), "NaN"),
        (_with("up.weight", torch.full((WIDTH, 4), math.inf)), "NaN"),
        (_with("up.weight", torch.full((WIDTH, 4), math.nan).to(torch.float8_e4m3fn)), "NaN"),
        (_with("up.weight", torch.ones(WIDTH, 4, dtype=torch.int32)), "not a floating-point format"),
        (_with(".alpha", torch.tensor(math.nan)), "not a finite number"),
        (_with(".alpha", torch.ones(2)), "alpha is not one number"),
        (lambda tensors: tensors.update({"something.else": torch.ones(1)}), "not a part of a LoRA"),
        (_with_two_spellings, "the same layer has"),
    ],
)
def test_damaged_pairs_are_refused(file: Path, damage: Callable[[dict[str, Tensor]], None], words: str) -> None:
    tensors = _kohya()
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=words) as caught:
        read_lora(file)
    assert caught.value.field == "lora_weight"
    assert str(file) in caught.value.message


def test_rank_zero_is_refused(file: Path) -> None:
    save_file({f"{QUERY}.lora_A.weight": torch.ones(0, WIDTH), f"{QUERY}.lora_B.weight": torch.ones(WIDTH, 0)}, file)
    with pytest.raises(UserError, match="a side is 0"):
        read_lora(file)


def test_eight_bit_files_are_read_as_bfloat16(file: Path) -> None:
    down, up = _pair()
    eight = {
        f"{QUERY}.lora_A.weight": down.to(torch.float8_e4m3fn),
        f"{QUERY}.lora_B.weight": up.to(torch.float8_e4m3fn),
    }
    save_file(eight, file)
    weights = next(iter(read_lora(file).layers.values()))
    assert weights.down.dtype == torch.bfloat16
    assert torch.equal(weights.down.float(), eight[f"{QUERY}.lora_A.weight"].float())


def test_a_checkpoint_is_not_a_lora(file: Path) -> None:
    save_file({"visual_embeddings.in_layer.weight": torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match="is not a LoRA"):
        read_lora(file)


def test_up_to_ten_unmatched_entries_are_listed(file: Path) -> None:
    tensors = _kohya()
    for index in range(14):
        tensors |= _kohya(f"down_blocks.{index}.attentions.0.to_q")
    save_file(tensors, file)
    with pytest.raises(UserError, match="14 of 15 entries match no layer") as caught:
        resolve(read_lora(file), linear_targets(skeleton()))
    assert caught.value.message.count("\n  lora_unet_down_blocks_") == 10
    assert "and 4 more" in caught.value.message


def test_shapes_that_do_not_fit_are_listed(file: Path) -> None:
    name = QUERY.replace("query", "key")
    save_file({f"{name}.lora_A.weight": torch.ones(2, 99), f"{name}.lora_B.weight": torch.ones(WIDTH, 2)}, file)
    with pytest.raises(UserError, match=r"made for 99 -> 16, the model's layer is 16 -> 16"):
        resolve(read_lora(file), linear_targets(skeleton()))


def test_two_entries_for_one_layer_are_refused(file: Path) -> None:
    first, second = _pair()
    save_file(
        {f"{prefix}{QUERY}.lora_{half}.weight": tensor.clone()
         for prefix in ("transformer.", "diffusion_model.") for half, tensor in (("A", first), ("B", second))},
        file,
    )  # fmt: skip
    with pytest.raises(UserError, match="a second entry for"):
        resolve(read_lora(file), linear_targets(skeleton()))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_lite_lora_on_pro_is_said_in_one_sentence(file: Path, file_format: str) -> None:
    widths = {name: config.model_dim for name, config in KNOWN_ARCHITECTURES.items()}
    lite = LoraWeights(torch.ones(2, widths["lite"]), torch.ones(widths["lite"], 2), 2.0)
    write_lora(file, {QUERY: lite, "visual_transformer_blocks.31.self_attention.to_query": lite}, file_format)
    with torch.device("meta"):
        root = torch.nn.Module()
        layer = torch.nn.Linear(widths["pro"], widths["pro"])
    blocks = torch.nn.ModuleList([torch.nn.Module()])
    blocks[0].self_attention = torch.nn.Module()
    blocks[0].self_attention.to_query = layer
    root.visual_transformer_blocks = blocks
    with pytest.raises(UserError) as caught:
        resolve(read_lora(file), linear_targets(root))
    assert "made for a Kandinsky 5 Lite model (width 1792)" in caught.value.message
    assert "this is a Kandinsky 5 Pro model (width 4096)" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 60,
        b"\x80\x04" + b"\0" * 60,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 5) + b"[[[[[",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_hostile_and_truncated_files_are_user_errors(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lora(file)
    assert caught.value.field == "lora_weight"
    assert "Traceback" not in caught.value.message


def test_every_truncation_and_a_missing_file_are_user_errors(file: Path) -> None:
    save_file(_kohya(), file)
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_lora(file)
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        read_lora(file)


def test_random_damage_of_the_header_never_escapes_as_another_error(file: Path) -> None:
    save_file(_kohya(), file)
    whole = file.read_bytes()
    header_length = 8 + struct.unpack("<Q", whole[:8])[0]
    draw = random.Random(5)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(header_length)] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            resolve(read_lora(file), linear_targets(skeleton()))
        except UserError as error:
            refused += 1
            assert error.field == "lora_weight"
    assert refused > 300


def test_a_file_that_is_overwritten_in_place_changes_nothing_that_was_read(file: Path) -> None:
    """Tensors that only map the file would change with it, or end the process when it becomes shorter."""
    lora = random_lora(skeleton(), [QUERY])
    write_lora(file, lora)
    read = read_lora(file)
    with open(file, "r+b") as handle:
        handle.write(b"\0" * file.stat().st_size)
    weights = next(iter(read.layers.values()))
    assert torch.equal(weights.down, lora[QUERY].down)
    assert torch.equal(weights.up, lora[QUERY].up)


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora(file, random_lora(skeleton()))
    before = file.read_bytes()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backend.lora.formats.save_file", full)
    with pytest.raises(UserError, match="No space is left"):
        write_lora(file, random_lora(skeleton(), seed=9))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_write_takes_views_and_a_number_format(file: Path) -> None:
    lora = random_lora(skeleton(), [QUERY], rank=4, alpha=3.7)
    shared = LoraWeights(lora[QUERY].up.t(), lora[QUERY].up, 3.7)
    write_lora(file, {QUERY: shared}, dtype=torch.bfloat16)
    with safe_open(file, framework="pt") as handle:
        stem = "lora_unet_" + QUERY.replace(".", "_")
        assert handle.get_tensor(f"{stem}.lora_down.weight").dtype == torch.bfloat16
        assert torch.equal(handle.get_tensor(f"{stem}.lora_down.weight"), lora[QUERY].up.t().bfloat16())
        assert float(handle.get_tensor(f"{stem}.alpha")) == pytest.approx(3.7, rel=1e-7)
        assert handle.metadata()["ss_network_alpha"] == "3.7"


def test_write_refuses_what_it_cannot_mean(file: Path) -> None:
    with pytest.raises(ValueError, match="format"):
        write_lora(file, random_lora(skeleton()), "onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one layer"):
        write_lora(file, {})
    assert not file.exists()
