"""Every mistake in a request is found from names and headers alone, before any weight is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.checks import check_generate, is_hub_name, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.tasks import DEMO_WEIGHTS
from tests.unit.config.headers import write_header_only

PRO = "k5-pro-t2v-5s-sd"
TEXT = {
    "text_encoder_qwen": str(DEMO_WEIGHTS / "text_encoder"),
    "text_encoder_clip": str(DEMO_WEIGHTS / "text_encoder_2"),
}


def _check(tmp_path: Path, **values: Any) -> dict[str | None, str]:
    defaults = {"task": "k5-demo-t2v", "prompt": "a cat", "output": str(tmp_path / "out" / "clip.mp4")}
    started = time.perf_counter()
    problems = check_generate(GenerateOptions(**(defaults | values)))
    assert time.perf_counter() - started < 10  # Normally a few milliseconds; the bound holds on a machine under load.
    assert not (tmp_path / "out").exists()
    assert len({(problem.field, problem.message) for problem in problems}) == len(problems)
    return {problem.field: problem.message for problem in problems}


@pytest.fixture
def lite(tmp_path: Path) -> str:
    return str(write_header_only(tmp_path / "lite.safetensors", KNOWN_ARCHITECTURES["lite"].expected_tensors()))


@pytest.fixture
def pro(tmp_path: Path) -> str:
    return str(write_header_only(tmp_path / "pro.safetensors", KNOWN_ARCHITECTURES["pro"].expected_tensors()))


@pytest.fixture
def lora(tmp_path: Path) -> str:
    name = "lora_unet_visual_transformer_blocks_0_self_attention_to_query"
    tensors = {f"{name}.lora_down.weight": (4, 192), f"{name}.lora_up.weight": (192, 4), f"{name}.alpha": ()}
    return str(write_header_only(tmp_path / "lora.safetensors", tensors))


# --- weights ------------------------------------------------------------------------------------------------------


def test_the_demo_needs_nothing(tmp_path: Path) -> None:
    assert _check(tmp_path) == {}
    assert _check(tmp_path, output_type="both", seed=-1, frames=6) == {}


def test_real_tasks_say_what_is_missing(tmp_path: Path) -> None:
    found = _check(tmp_path, task=PRO)
    assert set(found) == {"dit", "vae"}
    assert "kandinsky5pro_t2v_sft_5s.safetensors" in found["dit"]


def test_a_pro_file_fits_pro_tasks_in_less_than_a_second(tmp_path: Path, pro: str) -> None:
    started = time.process_time()
    found = _check(tmp_path, task=PRO, dit=pro, vae=str(DEMO_WEIGHTS / "vae"), **TEXT)
    assert time.process_time() - started < 1.0
    assert found == {}


def test_a_lite_file_given_to_a_pro_task_is_a_table(tmp_path: Path, lite: str) -> None:
    """Trap B16: a checkpoint of another size is refused with what was expected and what was found."""
    found = _check(tmp_path, task=PRO, dit=lite, vae=str(DEMO_WEIGHTS / "vae"), **TEXT)
    assert set(found) == {"dit"}
    assert found["dit"].startswith(f"lite.safetensors does not fit {PRO}:")
    assert "4096" in found["dit"]
    assert "1792" in found["dit"]


def test_a_pro_file_given_to_a_lite_task(tmp_path: Path, pro: str) -> None:
    found = _check(tmp_path, task="k5-lite-t2v-5s-sd", dit=pro, vae=str(DEMO_WEIGHTS / "vae"), **TEXT)
    assert set(found) == {"dit"}


@pytest.mark.parametrize(
    ("option", "part"),
    [("dit", "vae"), ("dit", "text_encoder"), ("dit", "text_encoder_2"), ("vae", "transformer"),
     ("vae", "text_encoder"), ("text_encoder_qwen", "text_encoder_2"), ("text_encoder_qwen", "vae"),
     ("text_encoder_clip", "text_encoder"), ("text_encoder_clip", "transformer")],
)  # fmt: skip
def test_a_part_given_in_place_of_another(tmp_path: Path, option: str, part: str) -> None:
    found = _check(tmp_path, **{option: str(DEMO_WEIGHTS / part)})
    assert set(found) == {option}
    assert ", not a" in found[option]
    assert found[option].endswith("Choose another file.")


@pytest.mark.parametrize("option", ["dit", "vae", "text_encoder_qwen", "text_encoder_clip"])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "pickle", "text", "empty folder", "long", "hostile"])
def test_bad_weight_files(tmp_path: Path, option: str, kind: str) -> None:
    path = tmp_path / "bad.safetensors"
    source = next((DEMO_WEIGHTS / "transformer").glob("*.safetensors")).read_bytes()
    contents = {
        "empty": b"",
        "truncated": source[: len(source) // 2],
        "pickle": b"PK\x03\x04" + bytes(100),
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "hostile": (2**62).to_bytes(8, "little") + b"{" + bytes(100),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "empty folder":
        path.mkdir()
    found = _check(tmp_path, **{option: "x/" * 3000 + "y" if kind == "long" else str(path)})
    assert set(found) == {option}
    assert len(found[option]) > 20


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen2.5-VL-7B-Instruct")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "local").mkdir()
    assert not is_hub_name("Qwen/local")
    for path in ("/abs/path", "one", "a/b/c", "a b/c", "../x/y", ""):
        assert not is_hub_name(path)
    assert _check(tmp_path, text_encoder_qwen="Qwen/Qwen2.5-VL-7B-Instruct") == {}
    assert set(_check(tmp_path, vae="org/name", dit="org/name")) == {"vae", "dit"}


def test_only_what_is_used_is_asked_for(tmp_path: Path, pro: str) -> None:
    assert _check(tmp_path, task=PRO, dit=pro, output_type="latent", **TEXT) == {}
    latent = write_header_only(tmp_path / "a.latent.safetensors", {"latent": (16, 5, 8, 8)}, "F32", 32)
    assert set(_check(tmp_path, task=PRO, prompt=None, latent_path=str(latent))) == {"vae"}


def test_weights_named_in_the_options_beat_the_task(tmp_path: Path) -> None:
    paths = weight_paths(GenerateOptions(task="k5-demo-t2v", dit="mine"))
    assert paths.dit == "mine"
    assert paths.vae == str(DEMO_WEIGHTS / "vae")


# --- LoRAs and latents --------------------------------------------------------------------------------------------


def test_loras(tmp_path: Path, lora: str, lite: str) -> None:
    assert _check(tmp_path, lora_weight=[lora]) == {}
    assert "not a LoRA" in _check(tmp_path, lora_weight=[lora, lite])["lora_weight"]
    assert "does not exist" in _check(tmp_path, lora_weight=["none.safetensors"])["lora_weight"]
    assert "does not exist" in _check(tmp_path, lora_weight=[str(tmp_path)])["lora_weight"]
    assert "2 strengths for 1" in _check(tmp_path, lora_weight=[lora], lora_multiplier=[1, 2])["lora_multiplier"]
    assert _check(tmp_path, lora_weight=[lora, lora], lora_multiplier=[0.5]) == {}


@pytest.mark.parametrize("shape", [(16, 8, 8), (4, 5, 8, 8), (16, 5, 8, 8, 1), ()])
def test_latent_files_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write_header_only(tmp_path / "a.latent.safetensors", {"latent": shape}, "F32", 32)
    assert "no tensor 'latent' of shape [16, F, H, W]" in _check(tmp_path, latent_path=str(path))["latent_path"]


def test_latent_files_that_are_none(tmp_path: Path) -> None:
    assert "does not exist" in _check(tmp_path, latent_path="none")["latent_path"]
    assert set(_check(tmp_path, latent_path=str(DEMO_WEIGHTS / "vae" / "config.json"))) == {"latent_path"}
    other = write_header_only(tmp_path / "a.safetensors", {"x": (1,)})
    assert "no tensor 'latent'" in _check(tmp_path, latent_path=str(other))["latent_path"]


# --- outputs ------------------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    assert "is a file, not a folder" in _check(tmp_path, output=str(tmp_path / "file" / "a.mp4"))["output"]
    assert "is a folder" in _check(tmp_path, output=str(tmp_path / "folder.mp4"))["output"]
    assert "too long" in _check(tmp_path, output=str(tmp_path / f"{'x' * 300}.mp4"))["output"]
    assert "is missing" in _check(tmp_path, output=None)["output"]
    assert "is a file" in _check(tmp_path, text_cache_dir=str(tmp_path / "file"))["text_cache_dir"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission" in _check(tmp_path)["output"]


def test_a_prompt_file_reports_its_folder_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "prompts.txt").write_text("a\n" * 50)
    options = GenerateOptions(
        task="k5-demo-t2v", from_file=str(tmp_path / "prompts.txt"), output=str(tmp_path / "file" / "out")
    )
    assert len(check_generate(options)) == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All clips of a file count together; images need more than a clip."""
    (tmp_path / "prompts.txt").write_text("a\n" * 100)
    many = {"prompt": None, "from_file": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "out")}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 1_100_000))
    assert _check(tmp_path) == {}
    assert "1 MB free" in _check(tmp_path, output_type="images", output=str(tmp_path / "out" / "a.png"))["output"]
    assert "4 MB are needed" in _check(tmp_path, **many)["output"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 0))
    assert set(_check(tmp_path)) == {"output"}


# --- all together -------------------------------------------------------------------------------------------------


def test_every_problem_at_once(tmp_path: Path, lite: str) -> None:
    (tmp_path / "bad.png").write_text("x")
    found = _check(
        tmp_path, task="k5-pro-i2v-5s-hd", prompt="", image=str(tmp_path / "bad.png"), width=100, height=100, dit=lite,
        vae="none", lora_weight=["none"], lora_multiplier=[1, 1], output="a.txt", text_cache_dir=lite,
    )  # fmt: skip
    assert set(found) == {
        "prompt", "image", "width", "height", "dit", "vae", "lora_weight", "lora_multiplier", "output",
        "text_cache_dir",
    }  # fmt: skip


def test_a_prompt_file_with_mistakes_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a --w 3\n--x\n")
    found = _check(tmp_path, prompt=None, from_file=str(tmp_path / "prompts.txt"), vae="none")
    assert set(found) == {"from_file", "vae"}


_TORCH_FREE = """
import json, sys
from backend.config.checks import check_generate
from backend.config.generate import GenerateOptions
import backend.config.docs, backend.config.metadata
problems = check_generate(GenerateOptions(**json.loads(sys.argv[1])))
heavy = {"torch", "transformers", "diffusers", "gradio"}
print(json.dumps([[p.field for p in problems], sorted(heavy & set(sys.modules))]))
"""


def test_checking_imports_no_torch(tmp_path: Path, repository: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    values = {"task": "k5-demo-i2v", "prompt": "x", "image": str(tmp_path / "a.png"), "output": str(tmp_path / "a.mp4")}
    done = subprocess.run(
        [sys.executable, "-c", _TORCH_FREE, json.dumps(values)], cwd=repository, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == [[], []]
