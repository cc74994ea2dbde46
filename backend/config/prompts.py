"""From options and prompt files to the clips that will be made: one request for each prompt, every value settled.

Prompt files: `.txt` (one prompt a line, `#` comments, overrides after ` --`), `.toml` ([prompt] with [[prompt.subset]])
and `.json` (a list, or an object with `prompts`), as users of musubi-tuner know them. Lengths are pixel frames.
"""

from __future__ import annotations

import json
import re
import secrets
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.config.generate import GenerateOptions
from backend.config.images import image_size, size_for_image
from backend.config.options import from_mapping
from backend.config.safetensors_header import read_header
from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT, TASKS, TaskPreset, valid_frames
from backend.errors import Problem, Problems, UserError
from backend.files import safe_name

MAX_PROMPT_FILE_BYTES = 4_000_000
MAX_PROMPTS = 10_000
_LINE_KEYS = {
    "w": "width",
    "h": "height",
    "f": "frames",
    "d": "seed",
    "s": "steps",
    "g": "guidance",
    "l": "guidance",
    "fs": "scheduler_scale",
    "n": "negative_prompt",
    "i": "image",
    "ei": "image_last",
}
_TABLE_KEYS = _LINE_KEYS | {
    "frame_count": "frames",
    "video_length": "frames",
    "sample_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "discrete_flow_shift": "scheduler_scale",
    "image_path": "image",
    "end_image_path": "image_last",
}
_OVERRIDES = (
    "prompt", "negative_prompt", "width", "height", "frames", "fps", "seed", "steps", "guidance", "scheduler_scale",
    "image", "image_last",
)  # fmt: skip
_INTEGERS = {"width", "height", "frames", "fps", "seed", "steps"}
_NUMBERS = {"guidance", "scheduler_scale"}
_FILE_SUFFIXES = {".mp4", ".png", ".webp", ".safetensors"}
_CONTROL_KEYS = {"cn", "ci", "of", "control_video_path", "control_image_path", "one_frame"}


@dataclass(frozen=True)
class ClipRequest:
    """One clip to make; sizes in pixels, frames in pixel frames (4n + 1), seed settled, output path settled."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guidance: float
    scheduler_scale: float
    seed: int
    image: str | None
    image_last: str | None
    output: Path
    options: GenerateOptions = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """The clips of one run and what a person should know before it starts."""

    clips: list[ClipRequest]
    notices: list[Problem]


def plan_clips(options: GenerateOptions, run_dir: str | Path | None = None) -> Plan:
    """Settle every clip that `options` asks for.

    Raises:
        Problems: missing prompt or image, sizes or frames that do not fit, bad lines of the prompt file (all of them).
    """
    problems: list[Problem] = []
    entries: list[tuple[str, dict[str, Any]]] = [("", {})]
    if options.from_file is not None:
        entries, problems = read_prompt_file(options.from_file)
    if options.prompt is not None and options.from_file is not None:
        problems.append(Problem("prompt", "--prompt and --from_file exclude each other. Choose one."))
    if options.latent_path is not None and options.from_file is not None:
        problems.append(Problem("latent_path", "--latent_path and --from_file exclude each other. Choose one."))
    clips: list[ClipRequest] = []
    notices: dict[Problem, None] = {}
    base = options.model_dump()
    for index, (place, overrides) in enumerate(entries):
        try:
            settled = from_mapping(GenerateOptions, base | overrides) if overrides else options
            clip, remarks = _settle(settled, index if options.from_file else None, run_dir)
            clips.append(clip)
            notices.update(dict.fromkeys(remarks))
        except Problems as error:
            for problem in error.problems:
                problems.append(_at_line(place, problem) if place else problem)
    if problems:
        raise Problems(problems)
    return Plan(clips, list(notices))


def _at_line(place: str, problem: Problem) -> Problem:
    name = f"{problem.field}: " if problem.field else ""
    return Problem("from_file", f"{place}: {name}{problem.message}")


def _settle(
    options: GenerateOptions, index: int | None, run_dir: str | Path | None
) -> tuple[ClipRequest, list[Problem]]:
    task = TASKS[options.task]
    problems, notices = _check_prompt_and_images(options, task)
    width, height, size_problems = _settle_size(options, task)
    problems += size_problems
    frames = task.frames if options.frames is None else options.frames
    if options.latent_path is not None:
        frames = _frames_of_latents(options.latent_path) or frames
    if frames != valid_frames(frames):
        fitting = valid_frames(frames)
        notices.append(
            Problem("frames", f"{frames} is not 4n + 1; {fitting} frames will be made (next: {fitting + 4}).")
        )
        frames = fitting
    if options.image_last and frames < 5:
        problems.append(Problem("frames", "a first and a last frame need at least 5 frames."))
    if task.fixed_size and (width, height) != (task.width, task.height):
        notices.append(
            Problem(
                "width",
                f"the demo model was trained at {task.width} x {task.height} only; expect noise at other sizes.",
            )
        )
    seed = secrets.randbelow(2**32) if options.seed == -1 else options.seed
    output, output_problems = _settle_output(options, frames, seed, index, run_dir)
    problems += output_problems
    if problems:
        raise Problems(problems)
    negative = DEFAULT_NEGATIVE_PROMPT if options.negative_prompt is None else options.negative_prompt
    clip = ClipRequest(
        prompt=options.prompt or "",
        negative_prompt=negative,
        width=width,
        height=height,
        frames=frames,
        fps=options.fps,
        steps=options.steps or task.steps,
        guidance=task.guidance if options.guidance is None else options.guidance,
        scheduler_scale=options.scheduler_scale or task.scheduler_scale,
        seed=seed,
        image=options.image,
        image_last=options.image_last,
        output=output,
        options=options,
    )
    return clip, notices


def _frames_of_latents(path: str) -> int | None:
    """Pixel frames that a latent file decodes to, from its header; None when it is not one (reported elsewhere)."""
    try:
        tensor = read_header(path).tensors.get("latent")
    except UserError:
        return None
    return 4 * (tensor.shape[1] - 1) + 1 if tensor is not None and len(tensor.shape) == 4 else None


def _check_prompt_and_images(options: GenerateOptions, task: TaskPreset) -> tuple[list[Problem], list[Problem]]:
    problems: list[Problem] = []
    notices: list[Problem] = []
    if options.latent_path is not None:
        return problems, notices
    if not (options.prompt or "").strip():
        problems.append(Problem("prompt", "is empty. Write what the clip shows."))
    if task.mode == "i2v" and not options.image:
        problems.append(Problem("image", f"{task.name} makes a clip from an image. Give its first frame."))
    if task.mode == "t2v" and (options.image or options.image_last):
        other = "k5-demo-i2v" if task.is_demo else f"k5-{task.architecture}-i2v-5s-sd"
        name = "image" if options.image else "image_last"
        problems.append(
            Problem(name, f"{task.name} makes a clip from text alone. Choose {other}, or leave the image out.")
        )
    if options.image_last and task.mode == "i2v":
        notices.append(Problem("image_last", "a last frame is experimental: the models were not trained for it."))
    return problems, notices


def _settle_size(options: GenerateOptions, task: TaskPreset) -> tuple[int, int, list[Problem]]:
    problems: list[Problem] = []
    sizes: dict[str, tuple[int, int]] = {}
    for name in ("image", "image_last"):
        path = getattr(options, name)
        if path and task.mode == "i2v" and options.latent_path is None:
            try:
                sizes[name] = image_size(path, name)
            except UserError as error:
                problems += error.problems
    if "image" in sizes and options.width is None and options.height is None and not task.fixed_size:
        return *size_for_image(*sizes["image"], task.max_area, task.size_multiple), problems
    width, height = options.width or task.width, options.height or task.height
    for name, value in (("width", width), ("height", height)):
        nearest = max(1, round(value / task.size_multiple)) * task.size_multiple
        if value % task.size_multiple:
            reason = "NABLA attention needs" if task.nabla else "the model needs"
            problems.append(
                Problem(
                    name, f"{value} does not fit: {reason} multiples of {task.size_multiple}. The nearest is {nearest}."
                )
            )
    return width, height, problems


def _settle_output(
    options: GenerateOptions, frames: int, seed: int, index: int | None, run_dir: str | Path | None
) -> tuple[Path, list[Problem]]:
    stills = options.output_type == "images"
    suffix = f".{options.image_format}" if stills or frames == 1 else ".mp4"
    stem = safe_name(Path(options.latent_path).name.split(".")[0] if options.latent_path else options.prompt or "clip")
    name = f"{stem}-{seed}{suffix}" if index is None else f"{index + 1:04d}-{stem}-{seed}{suffix}"
    if options.output is None:
        if run_dir is None:
            return Path(name), [Problem("output", "is missing. Give the file to write, for example clip.mp4.")]
        return Path(run_dir) / "outputs" / name, []
    output = Path(options.output)
    if index is not None:
        if output.suffix.lower() in _FILE_SUFFIXES:
            return output, [
                Problem("output", f"with --from_file this is a folder, but {output.name} looks like a file.")
            ]
        return output / name, []
    allowed = _allowed_suffixes(options, frames)
    if output.suffix.lower() not in allowed:
        wanted = " or ".join(sorted(allowed))
        what = (
            "a single frame"
            if frames == 1 and not stills
            else {"images": "images", "latent": "latents"}.get(options.output_type, "a clip")
        )
        return output, [Problem("output", f"{output.name} does not fit {what}: the name must end in {wanted}.")]
    return output, []


def _allowed_suffixes(options: GenerateOptions, frames: int) -> set[str]:
    if options.output_type == "latent":
        return {".mp4", ".png", ".webp", ".safetensors"}
    if options.output_type == "images":
        return {".png", ".webp"}
    return {".mp4", ".png", ".webp"} if frames == 1 else {".mp4"}


# --- prompt files -------------------------------------------------------------------------------------------------


def read_prompt_file(path: str | Path) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    """Read a prompt file into (place, overrides) pairs and the list of its bad lines.

    Raises:
        UserError: the file is missing, too large, not UTF-8, or of an unknown kind.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise UserError(f"{path.name} is larger than 4 MB. A prompt file has one prompt a line.", "from_file")
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Check the path.", "from_file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not UTF-8 text. Save it as UTF-8.", "from_file") from None
    readers = {".txt": _read_lines, ".toml": _read_toml, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path.name} is of an unknown kind. Use .txt, .toml or .json.", "from_file")
    entries, problems = readers[path.suffix.lower()](text)
    if not entries and not problems:
        problems = [Problem("from_file", f"{path.name} holds no prompt. Write one prompt a line.")]
    if len(entries) > MAX_PROMPTS:
        raise UserError(
            f"{path.name} holds {len(entries)} prompts; at most {MAX_PROMPTS} are taken. Split it.", "from_file"
        )
    return entries, problems


def _read_lines(text: str) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    entries, problems = [], []
    # Reading has turned every line end into \n; splitlines would also cut at rare characters inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        overrides, complaints = parse_prompt_line(line)
        problems += [Problem("from_file", f"line {number}: {complaint}") for complaint in complaints]
        if not complaints:
            entries.append((f"line {number}", overrides))
    return entries, problems


def parse_prompt_line(line: str) -> tuple[dict[str, Any], list[str]]:
    """Split `a cat --w 768 --n blurry` into overrides; returns them and what is wrong with the line."""
    head, *parts = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    overrides: dict[str, Any] = {"prompt": head.strip()}
    complaints = [] if head.strip() else ["there is no prompt before the first --."]
    for part in parts:
        key, value = (*part.split(None, 1), "")[:2]
        name = _LINE_KEYS.get(key)
        if key in _CONTROL_KEYS:
            complaints.append(f"--{key} belongs to control models, which Kandinsky 5 has not. Remove it.")
        elif name is None:
            complaints.append(f"--{key} is not known. Known are {', '.join('--' + k for k in _LINE_KEYS)}.")
        else:
            complaints += _put(overrides, f"--{key}", name, value.strip())
    return overrides, complaints


def _put(overrides: dict[str, Any], label: str, name: str, value: Any) -> list[str]:
    """Add one override, converted from text where needed; returns complaints."""
    if isinstance(value, str) and name in _INTEGERS | _NUMBERS:
        try:
            value = int(value) if name in _INTEGERS else float(value)
        except ValueError:
            return [f"{label} must be {'a whole number' if name in _INTEGERS else 'a number'}, not {value!r}."]
    if name in overrides and overrides[name] != value:
        return [f"{label} gives {name} a second time, with another value."]
    overrides[name] = value
    return []


def _read_table(table: Any, defaults: dict[str, Any], place: str) -> tuple[dict[str, Any], list[Problem]]:
    if isinstance(table, str):
        return defaults | {"prompt": table}, []
    if not isinstance(table, dict):
        return {}, [Problem("from_file", f"{place}: must be a prompt or a table, not {type(table).__name__}.")]
    overrides: dict[str, Any] = {}
    problems = []
    for key, value in table.items():
        name = key if key in _OVERRIDES else _TABLE_KEYS.get(key)
        if key in ("subset", "enum"):
            continue
        if name is None:
            problems.append(Problem("from_file", f"{place}: {key} is not known. Known are {', '.join(_OVERRIDES)}."))
        else:
            problems += [Problem("from_file", f"{place}: {text}") for text in _put(overrides, key, name, value)]
    return defaults | overrides, problems


def _read_toml(text: str) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        return [], [Problem("from_file", f"is not valid TOML: {error}.")]
    prompt = document.get("prompt")
    if not isinstance(prompt, dict):
        return [], [Problem("from_file", "has no [prompt] table. Write [prompt] and below it [[prompt.subset]].")]
    defaults, problems = _read_table(prompt, {}, "[prompt]")
    subsets = prompt.get("subset", [{}] if "prompt" in prompt else [])
    return _read_tables(subsets, defaults, problems, "[[prompt.subset]]")


def _read_json(text: str) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [], [Problem("from_file", f"is not valid JSON: {error}.")]
    items = document.get("prompts") if isinstance(document, dict) else document
    return _read_tables(items, {}, [], "prompt")


def _read_tables(
    items: Any, defaults: dict[str, Any], problems: list[Problem], label: str
) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem]]:
    if not isinstance(items, list):
        return [], [*problems, Problem("from_file", f"{label} must be a list.")]
    entries = []
    for number, item in enumerate(items, start=1):
        overrides, complaints = _read_table(item, defaults, f"{label} {number}")
        problems = problems + complaints
        if not complaints:
            entries.append((f"{label} {number}", overrides))
    return entries, problems
