"""Mistakes of a person at the command line: exit 2, one sentence each, an event with fields, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backend import kandinsky5_generate_video
from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.tasks import DEMO_WEIGHTS
from backend.events import read_events
from backend.sampling.outputs import write_latent
from tests.integration.command import TINY, run_command
from tests.unit.config.headers import write_header_only

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
DEMO = ("--task", "k5-demo-t2v", "--prompt", "a cat")
PRO = ("--task", "k5-pro-t2v-5s-sd", "--prompt", "a cat")
TEXT = (
    "--text_encoder_qwen", str(DEMO_WEIGHTS / "text_encoder"), "--text_encoder_clip",
    str(DEMO_WEIGHTS / "text_encoder_2"), "--vae", str(DEMO_WEIGHTS / "vae"),
)  # fmt: skip


def _file(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def _lite(folder: Path) -> str:
    return str(write_header_only(folder / "lite.safetensors", KNOWN_ARCHITECTURES["lite"].expected_tensors()))


def _gap(folder: Path) -> str:
    """A header whose tensors do not tile the data: a reader that trusts it reads something else."""
    header = json.dumps({"latent": {"dtype": "F32", "shape": [16, 1, 1, 1], "data_offsets": [64, 128]}}).encode()
    (folder / "gap.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
    return str(folder / "gap.safetensors")


def _half(folder: Path) -> str:
    source = next((DEMO_WEIGHTS / "transformer").glob("*.safetensors")).read_bytes()
    return _file("half.safetensors", source[: len(source) - 100])(folder)


def _nan_latents(folder: Path) -> str:
    write_latent(folder / "nan.latent.safetensors", torch.full((16, 1, 2, 2), torch.nan), {"options": {}})
    return str(folder / "nan.latent.safetensors")


def _damaged_image(folder: Path) -> str:
    pixels = numpy.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(folder / "cut.png")
    return _file("cut.png", (folder / "cut.png").read_bytes()[:3000])(folder)


# What is asked, the field that must be blamed, words that the sentence must hold.
Case = tuple[tuple[str | Callable[[Path], str], ...], str | None, str]
CASES: dict[str, Case] = {
    "no prompt": (("--task", "k5-demo-t2v"), "prompt", "Write what the clip shows"),
    "unknown flag": ((*DEMO, "--step", "3"), None, "Did you mean --steps?"),
    "unknown task": ((*DEMO, "--task", "k5-pro"), "task", "must be one of"),
    "nan": ((*DEMO, "--guidance", "nan"), "guidance", "finite"),
    "size": ((*DEMO, "--width", "100"), "width", "The nearest is 96."),
    "length": ((*DEMO, "--frames", "0"), "frames", "at least 1"),
    "device": ((*DEMO, "--device", "tpu"), "device", "tpu"),
    "missing dit": ((*DEMO, "--dit", "none.safetensors"), "dit", "does not exist"),
    "vae as dit": ((*DEMO, "--dit", str(DEMO_WEIGHTS / "vae")), "dit", "not a DiT"),
    "lite for pro": ((*PRO, *TEXT, "--dit", _lite), "dit", "does not fit k5-pro-t2v-5s-sd"),
    "truncated dit": ((*DEMO, "--dit", _half), "dit", "half.safetensors"),
    "hostile header": ((*DEMO, "--dit", _file("big.safetensors", b"\xff" * 7 + b"\x7f{" + bytes(50))), "dit", "big"),
    "pickle": ((*DEMO, "--vae", _file("vae.pt", b"PK\x03\x04" + bytes(99))), "vae", "pickle"),
    "lora that is none": ((*DEMO, "--lora_weight", str(DEMO_WEIGHTS / "vae" / "config.json")), "lora_weight", "config"),
    "image for text": ((*DEMO, "--image", "a.png"), "image", "leave the image out"),
    "no image": (("--task", "k5-demo-i2v", "--prompt", "x"), "image", "Give its first frame"),
    "not an image": (
        ("--task", "k5-demo-i2v", "--prompt", "x", "--image", _file("a.png", b"text")), "image", "not an image",
    ),
    "image cut short": (
        ("--task", "k5-demo-i2v", "--prompt", "x", "--image", _damaged_image), "image", "cut.png is not an image",
    ),
    "config file": ((*DEMO, "--config_file", _file("a.toml", b"steps = ")), "config_file", "not valid TOML"),
    "prompt file": (
        ("--task", "k5-demo-t2v", "--from_file", _file("a.txt", b"x --zz\nok\n--w 1\n")), "from_file", "line 3",
    ),
    "latents with a gap": (("--task", "k5-demo-t2v", "--latent_path", _gap), "latent_path", "damaged"),
    "latents of nan": (("--task", "k5-demo-t2v", "--latent_path", _nan_latents), "latent_path", "no finite latents"),
    "output": ((*DEMO, "--output", "clip.avi"), "output", "must end in .mp4"),
    "output below a file": ((*DEMO, "--output", str(Path(__file__) / "a.mp4")), "output", "is a file, not a folder"),
    "attention": ((*DEMO, "--flash3"), "attention", "flash"),
    "strengths": ((*DEMO, "--lora_multiplier", "1"), "lora_multiplier", "Give one for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_sentence_at_its_field(tmp_path: Path, name: str) -> None:
    words, field, expected = CASES[name]
    work = tmp_path / "files"
    work.mkdir()
    run = run_command(tmp_path / "run", *(word if isinstance(word, str) else word(work) for word in words))
    given = {item.name for item in work.iterdir()}
    assert run.code == 2, run.stderr
    (error,) = run.of("error")
    blamed = [problem for problem in error["problems"] if problem["field"] == field]
    assert any(expected in problem["message"] for problem in blamed), error["problems"]
    assert error["exit_code"] == 2
    assert "Traceback" not in run.stderr
    assert expected in run.stderr
    assert run.events[-1]["type"] == "error"
    assert run.of("sample") == []
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == ["events.jsonl"]
    assert {item.name for item in work.iterdir()} == given


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    run = run_command(
        tmp_path / "run", "--task", "k5-pro-i2v-5s-hd", "--width", "100", "--dit", "none", "--lora_weight", "none"
    )
    (error,) = run.of("error")
    fields = {problem["field"] for problem in error["problems"]}
    assert fields == {"prompt", "image", "width", "dit", "vae", "lora_weight"}
    assert error["message"] == f"{len(error['problems'])} problems in the request."
    assert len(run.stderr.strip().splitlines()) == len(error["problems"])
    assert "--width: 100 does not fit: NABLA" in run.stderr


def test_a_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    run = run_command(tmp_path / "run", *DEMO)
    assert run.code == 2
    assert run.of("error")[0]["field"] == "output"
    assert "Free some space" in run.stderr


def test_a_folder_that_vanishes_while_the_engine_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backend.sampling import clips as module

    original = module.denoise

    def sabotage(*arguments: object) -> torch.Tensor:
        (tmp_path / "out").write_text("a file in the way")
        return original(*arguments)

    monkeypatch.setattr(module, "denoise", sabotage)
    output = tmp_path / "out" / "clip.mp4"
    run = run_command(tmp_path / "run", *TINY, "--prompt", "x", "--output_type", "latent", "--output", str(output))
    assert run.code == 2
    assert "cannot be written" in run.of("error")[0]["message"]
    assert run.of("error")[0]["phase"] == "save"
    assert "Traceback" not in run.stderr


def test_a_lora_for_another_model_is_refused(tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.randn(2, 192), "lora_up.weight": torch.randn(192, 2), "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_blocks_9_to_q.{k}": v for k, v in pair.items()}, tmp_path / "other.safetensors")
    run = run_command(tmp_path / "run", *TINY, "--prompt", "x", "--lora_weight", str(tmp_path / "other.safetensors"))
    assert run.code == 2
    assert "lora_unet_blocks_9_to_q" in run.of("error")[0]["message"]
    assert "Traceback" not in run.stderr


# --- in processes of their own ------------------------------------------------------------------------------------


def test_mistakes_are_answered_without_waiting_for_torch(tmp_path: Path, repository: Path) -> None:
    code = (
        "import sys; from backend.kandinsky5_generate_video import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    words = [*DEMO, "--dit", "none", "--output", str(tmp_path / "a.mp4")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n"
    assert done.stderr == "--dit: none does not exist. Check the path.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    words = [*DEMO, "--run_dir", str(tmp_path / "file" / "run")]
    assert kandinsky5_generate_video.main(words) == 2
    assert "cannot be opened" in capsys.readouterr().err


_FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy, torch
from backend.errors import UserError
from backend.kandinsky5_generate_video import main
from backend.sampling.outputs import write_image, write_latent, write_video

folder = Path(sys.argv[1])
noise = numpy.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=numpy.uint8)
settings = {"options": {"prompt": "x"}}
write_latent(folder / "good.latent.safetensors", torch.randn(16, 2, 8, 8), settings | {"seed": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for name, write in (
    ("a.png", lambda path: write_image(path, noise, settings)),
    ("a.webp", lambda path: write_image(path, noise, settings)),
    ("a.latent.safetensors", lambda path: write_latent(path, torch.randn(16, 2, 8, 8), settings)),
    ("a.mp4", lambda path: write_video(path, [noise] * 4, 24, settings)),
):
    try:
        write(folder / name)
        print(name, "was written")
    except UserError as error:
        print(name, error.message.split(" for ")[0])
words = ["--task", "k5-demo-t2v", "--latent_path", str(folder / "good.latent.safetensors")]
print(main([*words, "--output", str(folder / "b.mp4")]))
print(sorted(item.name for item in folder.iterdir()))
"""


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, repository: Path) -> None:
    """A limit on the size of files stands for the full disk: every writer says so and leaves nothing behind."""
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path)], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "a.png No space is left", "a.webp No space is left", "a.latent.safetensors No space is left",
        "a.mp4 No space is left", "2", "['good.latent.safetensors']",
    ], done.stderr  # fmt: skip
    assert "Traceback" not in done.stderr


def test_a_command_that_is_killed_leaves_nothing_under_a_final_name(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "backend.kandinsky5_generate_video", *DEMO, "--steps", "1000"]
    command += ["--run_dir", str(tmp_path / "run"), "--text_cache_dir", str(tmp_path / "text")]
    with subprocess.Popen(command, cwd=repository, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        try:
            for _ in range(5000):
                if any(record["type"] == "step" for record in read_events(tmp_path / "run" / "events.jsonl").records):
                    break
                assert process.poll() is None
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
    assert not (tmp_path / "run" / "outputs").exists()
    page = read_events(tmp_path / "run" / "events.jsonl")
    assert not page.gap
    assert page.records[-1]["type"] in ("step", "heartbeat")
