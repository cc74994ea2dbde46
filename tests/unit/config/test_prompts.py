"""Prompt files and plans: every clip settled, every bad line named, no file written twice."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from backend.config.generate import GenerateOptions
from backend.config.images import size_for_image
from backend.config.prompts import MAX_PROMPTS, ClipRequest, parse_prompt_line, plan_clips, read_prompt_file
from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT, TASKS
from backend.errors import Problems, UserError
from tests.unit.config.headers import write_header_only

DEMO = TASKS["k5-demo-t2v"]


def _options(**values: Any) -> GenerateOptions:
    return GenerateOptions(**({"task": "k5-demo-t2v", "prompt": "a cat", "output": "clip.mp4"} | values))


def _clip(**values: Any) -> ClipRequest:
    (clip,) = plan_clips(_options(**values)).clips
    return clip


def _problems(**values: Any) -> dict[str | None, list[str]]:
    with pytest.raises(Problems) as caught:
        plan_clips(_options(**values))
    found: dict[str | None, list[str]] = {}
    for problem in caught.value.problems:
        found.setdefault(problem.field, []).append(problem.message)
    return found


def _file(tmp_path: Path, content: str | bytes, suffix: str = ".txt") -> str:
    path = tmp_path / f"prompts{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def _from_file(tmp_path: Path, content: str | bytes, suffix: str = ".txt", **values: Any) -> list[ClipRequest]:
    return plan_clips(
        _options(prompt=None, from_file=_file(tmp_path, content, suffix), output=str(tmp_path / "out"), **values)
    ).clips


def _file_problems(tmp_path: Path, content: str | bytes, suffix: str = ".txt") -> list[str]:
    found = _problems(prompt=None, from_file=_file(tmp_path, content, suffix), output=str(tmp_path / "out"))
    assert set(found) == {"from_file"}
    return found["from_file"]


# --- one clip -----------------------------------------------------------------------------------------------------


def test_defaults_of_the_task_are_settled() -> None:
    clip = _clip()
    assert (clip.width, clip.height, clip.frames, clip.fps, clip.steps) == (64, 64, 17, 24, 20)
    assert (clip.guidance, clip.scheduler_scale, clip.seed) == (DEMO.guidance, 3.0, 42)
    assert clip.negative_prompt == DEFAULT_NEGATIVE_PROMPT
    assert clip.output == Path("clip.mp4")


def test_what_is_given_beats_the_task() -> None:
    values = {"width": 96, "height": 32, "frames": 5, "fps": 12, "steps": 3, "guidance": 1.0, "seed": 0}
    clip = _clip(**values, scheduler_scale=7.0, negative_prompt="")
    assert {name: getattr(clip, name) for name in values} == values
    assert (clip.scheduler_scale, clip.negative_prompt) == (7.0, "")


@pytest.mark.parametrize("frames", [*range(1, 30), 1001])
def test_frames_are_rounded_down_with_a_notice(frames: int) -> None:
    """Traps B6 and B14: frames are pixel frames, and only 4n + 1 exist."""
    plan = plan_clips(_options(frames=frames, output="clip.png" if frames < 5 else "clip.mp4"))
    expected = next(n for n in range(frames, 0, -1) if n % 4 == 1)
    assert plan.clips[0].frames == expected
    notices = [notice.message for notice in plan.notices if notice.field == "frames"]
    text = f"{frames} is not 4n + 1; {expected} frames will be made (next: {expected + 4})."
    assert notices == ([] if frames == expected else [text])


@pytest.mark.parametrize(
    ("task", "width", "nearest"),
    [("k5-demo-t2v", 70, 64), ("k5-demo-t2v", 73, 80), ("k5-pro-t2v-5s-sd", 770, 768), ("k5-pro-t2v-5s-hd", 1296, 1280),
     ("k5-pro-t2v-10s-sd", 48, 128)],
)  # fmt: skip
def test_a_size_that_does_not_fit_names_the_nearest(task: str, width: int, nearest: int) -> None:
    found = _problems(task=task, width=width)
    assert set(found) == {"width"}
    assert f"The nearest is {nearest}." in found["width"][0]
    assert ("NABLA" in found["width"][0]) == (nearest % 128 == 0 and task != "k5-pro-t2v-5s-sd")
    assert _clip(task=task, width=nearest).width == nearest


def test_every_problem_of_one_clip_at_once() -> None:
    assert set(_problems(prompt=" \n", width=65, height=63, output="clip.avi")) == {
        "prompt", "width", "height", "output",
    }  # fmt: skip


def test_seed_minus_one_is_drawn_and_recorded() -> None:
    seeds = {_clip(seed=-1).seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


# --- images -------------------------------------------------------------------------------------------------------


def test_the_image_decides_the_size_of_the_clip(tmp_path: Path) -> None:
    rng = random.Random(3)
    for number in range(10):
        size = rng.randint(30, 900), rng.randint(30, 900)
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        image = str(tmp_path / f"{number}.png")
        clip = _clip(task="k5-pro-i2v-5s-sd", image=image)
        assert (clip.width, clip.height) == size_for_image(*size, 512 * 768, 16)
        clip = _clip(task="k5-pro-i2v-5s-hd", image=image)
        assert (clip.width, clip.height) == size_for_image(*size, 1024 * 1024, 128)
        assert _clip(task="k5-demo-i2v", image=image).width == 64
        assert _clip(task="k5-pro-i2v-5s-sd", image=image, width=320).width == 320


def test_exif_orientation_turns_the_clip(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 100)).save(tmp_path / "a.jpg", exif=exif)
    clip = _clip(task="k5-pro-i2v-5s-sd", image=str(tmp_path / "a.jpg"))
    assert clip.height > clip.width


def test_images_that_are_missing_wrong_or_not_wanted(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (64, 64)).save(good)
    bad.write_text("no image")
    assert "Give its first frame" in _problems(task="k5-demo-i2v")["image"][0]
    assert "Choose k5-pro-i2v-5s-sd" in _problems(task="k5-pro-t2v-5s-sd", image=str(good))["image"][0]
    assert "Choose k5-demo-i2v" in _problems(image_last=str(good))["image_last"][0]
    assert "not an image" in _problems(task="k5-demo-i2v", image=str(bad))["image"][0]
    assert set(_problems(task="k5-demo-i2v", image=str(bad), image_last="none.png")) == {"image", "image_last"}


@pytest.mark.parametrize("task", ["k5-demo-i2v", "k5-pro-i2v-5s-sd", "k5-lite-i2v-5s-sd"])
def test_a_bad_last_image_is_found_beside_a_good_first_one(tmp_path: Path, task: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert (
        "does not exist" in _problems(task=task, image=str(tmp_path / "a.png"), image_last="none.png")["image_last"][0]
    )


def test_first_and_last_image(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    images = {"image": str(tmp_path / "a.png"), "image_last": str(tmp_path / "a.png")}
    plan = plan_clips(_options(task="k5-demo-i2v", **images))
    assert (plan.clips[0].image, plan.clips[0].image_last) == tuple(images.values())
    assert [notice.field for notice in plan.notices] == ["image_last"]
    assert "at least 5 frames" in _problems(task="k5-demo-i2v", frames=1, output="a.png", **images)["frames"][0]


# --- names of outputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"output": "a.mp4"}, None),
        ({"output": "a.MP4"}, None),
        ({"output": "a.png"}, ".mp4"),
        ({"output": "a"}, ".mp4"),
        ({"output": "a.png", "frames": 1}, None),
        ({"output": "a.webp", "frames": 1}, None),
        ({"output": "a.mp4", "frames": 1}, None),
        ({"output": "a.jpg", "frames": 1}, ".mp4 or .png or .webp"),
        ({"output": "a.png", "output_type": "images"}, None),
        ({"output": "a.mp4", "output_type": "images"}, ".png or .webp"),
        ({"output": "a.latent.safetensors", "output_type": "latent"}, None),
        ({"output": "a.latent.safetensors", "output_type": "both"}, ".mp4"),
    ],
)
def test_the_suffix_belongs_to_what_is_written(values: dict[str, Any], wanted: str | None) -> None:
    if wanted is None:
        assert _clip(**values).output == Path(values["output"])
    else:
        assert f"the name must end in {wanted}." in _problems(**values)["output"][0]


def test_without_an_output_the_run_folder_takes_it(tmp_path: Path) -> None:
    (clip,) = plan_clips(_options(output=None, prompt="A cat / walks"), tmp_path).clips
    assert clip.output == tmp_path / "outputs" / "A-cat-walks-42.mp4"
    (clip,) = plan_clips(_options(output=None, frames=1), tmp_path).clips
    assert clip.output.suffix == ".png"
    (clip,) = plan_clips(_options(output=None, output_type="images", image_format="webp"), tmp_path).clips
    assert clip.output.suffix == ".webp"
    assert "is missing" in _problems(output=None)["output"][0]


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "/etc/passwd", "CON", "🎬", "-rf ~", "a\nb", "x" * 5000, "𠀀" * 99]
)
def test_hostile_prompts_stay_inside_the_folder(tmp_path: Path, prompt: str) -> None:
    (clip,) = plan_clips(_options(output=None, prompt=prompt), tmp_path).clips
    assert clip.output.parent == tmp_path / "outputs"
    assert clip.output.resolve().is_relative_to(tmp_path)
    clip.output.parent.mkdir(exist_ok=True)
    clip.output.with_suffix(".latent.safetensors").write_text("the name fits")


def test_repeated_prompts_of_one_file_never_overwrite_each_other(tmp_path: Path) -> None:
    clips = _from_file(tmp_path, "a cat\n" * 30 + "A CAT\na  cat\n")
    assert len({str(clip.output).lower() for clip in clips}) == 32
    assert all(clip.output.parent == tmp_path / "out" for clip in clips)


def test_a_prompt_file_writes_into_a_folder(tmp_path: Path) -> None:
    file = _file(tmp_path, "a cat\n")
    found = _problems(prompt=None, from_file=file, output="clip.mp4")["from_file"][0]
    assert "looks like a file" in found
    (clip,) = plan_clips(_options(prompt=None, from_file=file, output=str(tmp_path / "v1.2"))).clips
    assert clip.output.parent == tmp_path / "v1.2"


# --- latent files -------------------------------------------------------------------------------------------------


def test_decoding_takes_its_length_from_the_latent_file(tmp_path: Path) -> None:
    for frames, output in ((1, "a.png"), (5, "a.mp4")):
        path = write_header_only(tmp_path / f"{frames}.latent.safetensors", {"latent": (16, frames, 8, 8)}, "F32", 32)
        (clip,) = plan_clips(_options(prompt=None, latent_path=str(path), output=output)).clips
        assert clip.frames == 4 * frames - 3
    assert "the name must end in .mp4" in _problems(prompt=None, latent_path=str(path), output="a.png")["output"][0]


def test_latents_and_prompt_files_exclude_each_other(tmp_path: Path) -> None:
    found = _problems(prompt=None, from_file=_file(tmp_path, "a\n"), latent_path="x", output=str(tmp_path / "out"))
    assert "exclude each other" in found["latent_path"][0]
    assert (
        "exclude each other" in _problems(from_file=_file(tmp_path, "a\n"), output=str(tmp_path / "out"))["prompt"][0]
    )


# --- .txt ---------------------------------------------------------------------------------------------------------


def test_every_letter_of_a_line() -> None:
    overrides, complaints = parse_prompt_line(
        "a cat --w 768 --h 512 --f 17 --d -1 --s 30 --g 4.5 --fs 7 --n blurry, ugly -- really --i a b.png --ei e.png"
    )
    assert complaints == []
    assert overrides == {
        "prompt": "a cat", "width": 768, "height": 512, "frames": 17, "seed": -1, "steps": 30, "guidance": 4.5,
        "scheduler_scale": 7.0, "negative_prompt": "blurry, ugly -- really", "image": "a b.png", "image_last": "e.png",
    }  # fmt: skip
    assert parse_prompt_line("a --l 2")[0]["guidance"] == 2.0
    assert parse_prompt_line("a\t--w\t64")[0] == {"prompt": "a", "width": 64}


@pytest.mark.parametrize("prompt", ["a cat -- a dog", "one--two", "a -w 5", "x - - y", "50% #1", 'it\'s "so" \\n'])
def test_dashes_inside_a_prompt_stay(prompt: str) -> None:
    assert parse_prompt_line(prompt) == ({"prompt": prompt}, [])


def test_comments_empty_lines_bom_and_line_ends(tmp_path: Path) -> None:
    content = "\ufeff# first\r\na cat --d 1\r\n\r\n   # more\r\n  a dog\u2028and\x85a\x0cbird --d 2\r\nlast"
    clips = _from_file(tmp_path, content)
    assert [(clip.prompt, clip.seed) for clip in clips] == [
        ("a cat", 1), ("a dog\u2028and\x85a\x0cbird", 2), ("last", 42),
    ]  # fmt: skip


def test_all_bad_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    found = _file_problems(
        tmp_path,
        "good\n--w 64\nx --zz 5\n# c\nx --w wide\nx --f\nx --cn a.mp4\nx --ci a.png\nx --of y\nx --w 65 --s 0\n"
        "x --d 1 --d 2\nx --g nan\n",
    )
    assert [text.split(":")[0] for text in found] == [
        "line 2", "line 3", "line 5", "line 6", "line 7", "line 8", "line 9", "line 11", "line 10", "line 12",
    ]  # fmt: skip
    text = "\n".join(found)
    assert "line 2: there is no prompt before the first --." in text
    assert "line 3: --zz is not known. Known are --w, --h," in text
    assert "line 5: --w must be a whole number, not 'wide'." in text
    assert text.count("belongs to control models") == 3
    assert "line 10: steps: must be at least 1" in text
    assert "line 11: --d gives seed a second time" in text


def test_sizes_of_lines_are_checked_like_flags(tmp_path: Path) -> None:
    found = _file_problems(tmp_path, "a --w 65\nb --h 17\nc\nd --w 70 --h 70\n")
    assert [text.split(" does not")[0] for text in found] == [
        "line 1: width: 65", "line 2: height: 17", "line 4: width: 70", "line 4: height: 70",
    ]  # fmt: skip


def test_options_are_the_defaults_of_every_line(tmp_path: Path) -> None:
    clips = _from_file(tmp_path, "a\nb --s 5 --n bad\n", steps=9, fps=10, negative_prompt="ugly")
    assert [(clip.steps, clip.fps, clip.negative_prompt) for clip in clips] == [(9, 10, "ugly"), (5, 10, "bad")]
    assert clips[1].options.steps == 5


# --- .toml and .json ----------------------------------------------------------------------------------------------


def test_toml(tmp_path: Path) -> None:
    content = (
        '[prompt]\nwidth = 96\nsample_steps = 4\nnegative_prompt = "ugly"\n'
        '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\nwidth = 32\ncfg_scale = 2\nd = 7\n'
    )
    clips = _from_file(tmp_path, content, ".toml")
    assert [(clip.prompt, clip.width, clip.steps, clip.guidance, clip.seed) for clip in clips] == [
        ("a", 96, 4, DEMO.guidance, 42), ("b", 32, 4, 2.0, 7),
    ]  # fmt: skip
    (clip,) = _from_file(tmp_path, '[prompt]\nprompt = "only"\n', ".toml")
    assert clip.prompt == "only"


@pytest.mark.parametrize("wrapped", [True, False])
def test_json(tmp_path: Path, wrapped: bool) -> None:
    items = ["a", {"prompt": "b", "frame_count": 5, "guidance_scale": 1}, {"prompt": "c", "seed": -1, "fps": 8}]
    clips = _from_file(tmp_path, json.dumps({"prompts": items} if wrapped else items), ".json")
    assert [(clip.prompt, clip.frames, clip.guidance, clip.fps) for clip in clips] == [
        ("a", 17, DEMO.guidance, 24), ("b", 5, 1.0, 24), ("c", 17, DEMO.guidance, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "suffix", "expected"),
    [
        ("[prompt]\nwidht = 5\n", ".toml", ["[prompt]: widht is not known"]),
        ("[prompt\n", ".toml", ["is not valid TOML"]),
        ("x = " + "9" * 5000, ".toml", ["is not valid TOML"]),
        ("x = 1\n", ".toml", ["has no [prompt] table"]),
        ("[prompt]\nsubset = 5\n", ".toml", ["[[prompt.subset]] must be a list"]),
        ("[prompt]\nsubset = []\n", ".toml", ["holds no prompt"]),
        ('["a"', ".json", ["is not valid JSON"]),
        ("[" * 100_000, ".json", ["is not valid JSON"]),
        ("5", ".json", ["prompt must be a list"]),
        ('{"x": []}', ".json", ["prompt must be a list"]),
        ('[5, null, "a", {"steps": 2.5, "prompt": "a"}, {"prompt": 5}, {"seed": true, "prompt": "a"}, {}]', ".json",
         ["prompt 1: must be a prompt or a table, not int.", "prompt 2: must be", "prompt 4: steps: must be a whole",
          "prompt 5: prompt: must be text", "prompt 6: seed: must be a whole", "prompt 7: prompt: is empty"]),
        ('[{"prompt": "a", "guidance": NaN}]', ".json", ["prompt 1: guidance: must be a finite number"]),
        ('[{"prompt": "a", "control_video_path": "x"}]', ".json", ["control_video_path is not known"]),
        ("", ".txt", ["holds no prompt"]),
        ("# only\n\n", ".txt", ["holds no prompt"]),
        ("[]", ".json", ["holds no prompt"]),
    ],
)  # fmt: skip
def test_files_with_mistakes(tmp_path: Path, content: str, suffix: str, expected: list[str]) -> None:
    found = _file_problems(tmp_path, content, suffix)
    assert len(found) == len(expected)
    assert all(words in message for words, message in zip(expected, found, strict=True))


# --- the file itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"\xff\xfea\0", "is not UTF-8"),
        ("a.txt", b"x" * 4_000_001, "larger than 4 MB"),
        ("a.csv", b"a cat", "unknown kind"),
        ("a.txt", None, "cannot be read"),
        ("a.txt", b"x\n" * (MAX_PROMPTS + 1), "at most 10000"),
    ],
)
def test_files_that_are_no_prompt_files(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_prompt_file(tmp_path / name)
    assert caught.value.field == "from_file"


def test_ten_thousand_prompts_are_planned(tmp_path: Path) -> None:
    clips = _from_file(tmp_path, "".join(f"cat {number} --d {number}\n" for number in range(MAX_PROMPTS)))
    assert [clip.seed for clip in clips] == list(range(MAX_PROMPTS))
    assert len({clip.output for clip in clips}) == MAX_PROMPTS


def test_plans_are_deterministic_but_for_drawn_seeds(tmp_path: Path) -> None:
    content = "a\nb --f 6\nc --w 96\n"
    first, second = (_from_file(tmp_path, content) for _ in range(2))
    assert first == second
    drawn = _from_file(tmp_path, content, seed=-1)
    assert len({clip.seed for clip in drawn}) == 3
    assert [replace(c, seed=0, output=Path(), options=d.options) for c, d in zip(drawn, first, strict=True)] == [
        replace(c, seed=0, output=Path()) for c in first
    ]


_WORDS = [
    "--w",
    "--h",
    "--f",
    "--d",
    "--s",
    "--g",
    "--l",
    "--fs",
    "--n",
    "--i",
    "--ei",
    "--cn",
    "--x",
    "--",
    "-",
    "#",
    "64",
] + [
    "17",
    "-1",
    "nan",
    "1e999",
    "9" * 5000,
    "a cat",
    "\t",
    "  ",
    "\r",
    "\u2028",
    "\x00",
    "🎬",
    "'",
    '"',
    "\\",
    "{}",
    "=",
]


def test_1000_random_files_are_plans_or_problems(tmp_path: Path) -> None:
    """Whatever a prompt file holds, the answer is clips or sentences about its lines."""
    rng, planned = random.Random(9), 0
    for _ in range(1000):
        lines = [" ".join(rng.choices(_WORDS, k=rng.randint(0, 6))) for _ in range(rng.randint(1, 4))]
        file = _file(tmp_path, "\n".join(lines))
        try:
            plan = plan_clips(_options(prompt=None, from_file=file, output=str(tmp_path / "out")))
        except Problems as error:
            assert {problem.field for problem in error.problems} == {"from_file"}
            continue
        planned += 1
        assert len({clip.output for clip in plan.clips}) == len(plan.clips)
        for clip in plan.clips:
            assert clip.frames % 4 == 1
            assert clip.width % 16 == clip.height % 16 == 0
            assert clip.prompt.strip()
    assert planned > 30
