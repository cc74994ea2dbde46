"""Everything that can be wrong with a request to generate, found before any weight is loaded, and without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from backend.config.checkpoint import KNOWN_ARCHITECTURES, CheckpointInfo, compare_with_task, identify, read_header
from backend.config.generate import GenerateOptions
from backend.config.prompts import ClipRequest, Plan, plan_clips
from backend.config.tasks import TASKS, TaskPreset, WeightPaths, default_weights
from backend.config.train_data import TrainDataOptions
from backend.errors import Problem, Problems, UserError
from backend.files import check_writable, require_free_space

_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")
_SPARE_BYTES = 1_000_000
#: What a VAE is called in the folders that people download.
VAE_EXAMPLE = "vae/diffusion_pytorch_model.safetensors"
_KIND_WORDS = {
    "dit": "a DiT",
    "vae": "a VAE",
    "text_encoder": "a Qwen text encoder",
    "clip": "a CLIP text encoder",
    "lora": "a LoRA",
}


def weight_paths(options: GenerateOptions | TrainDataOptions) -> WeightPaths:
    """The weights that `options` means: what it names, else what belongs to its task, if it has one."""
    task = options.task
    defaults = default_weights(TASKS[task]) if task is not None else WeightPaths(None, None, None, None)
    return WeightPaths(
        options.dit or defaults.dit,
        options.vae or defaults.vae,
        options.text_encoder_qwen or defaults.text_encoder_qwen,
        options.text_encoder_clip or defaults.text_encoder_clip,
    )


def is_hub_name(path: str) -> bool:
    """Whether `path` names a repository of a model hub (`Qwen/Qwen2.5-VL-7B-Instruct`) and nothing on this disk."""
    return bool(_HUB_NAME.match(path)) and not os.path.exists(path)


def check_generate(options: GenerateOptions, run_dir: str | Path | None = None) -> list[Problem]:
    """Every problem of `options`, each with its field; an empty list means that generation can start."""
    problems: list[Problem] = []
    try:
        problems += _check_outputs(plan_clips(options, run_dir))
    except Problems as error:
        problems += error.problems
    problems += check_weights(options)
    problems += _check_loras(options)
    if options.latent_path is not None:
        problems += _check_latent_file(options.latent_path)
    if options.text_cache_dir is not None:
        problems += _check_folder(options.text_cache_dir, "text_cache_dir")
    return list(dict.fromkeys(problems))


def check_weights(options: GenerateOptions) -> list[Problem]:
    """Whether the weights of `options` are there and are what their option says, by headers alone."""
    task, paths = TASKS[options.task], weight_paths(options)
    problems: list[Problem] = []
    decode_only = options.latent_path is not None
    example = f"{VAE_EXAMPLE} for {task.name}"
    if not decode_only:
        problems += check_weight("dit", paths.dit, "dit", f"{task.checkpoint} for {task.name}", fits_task(task))
        problems += check_weight("text_encoder_qwen", paths.text_encoder_qwen, "text_encoder", example)
        problems += check_weight("text_encoder_clip", paths.text_encoder_clip, "clip", example)
    if options.output_type != "latent" or (task.mode == "i2v" and not decode_only):
        problems += check_weight("vae", paths.vae, "vae", example)
    return problems


def fits_task(task: TaskPreset) -> Callable[[CheckpointInfo], str | None]:
    """Says of a DiT's header what does not fit `task`; None if all does."""

    def compare(info: CheckpointInfo) -> str | None:
        expected = KNOWN_ARCHITECTURES[task.architecture]
        if info.architecture == "custom" and info.config and info.config.in_channels == expected.in_channels:
            return None  # A size of the family that no preset names: it runs with the task's schedule.
        rows = compare_with_task(info, expected)
        return f"does not fit {task.name}:\n  " + "\n  ".join(rows) if rows else None

    return compare


def check_weight(
    field: str,
    path: str | None,
    kind: str,
    missing: str,
    compare: Callable[[CheckpointInfo], str | None] | None = None,
) -> list[Problem]:
    """Whether the weights of one option are there and are of their kind, by headers alone.

    Args:
        kind: what `backend.config.checkpoint.identify` must call them: "dit", "vae", "text_encoder" or "clip".
        missing: what to give when there is no path, for people ("vae/model.safetensors for k5-pro-t2v-5s-sd").
        compare: says what else does not fit, None if all does.
    """
    if path is None:
        return [Problem(field, f"is missing. Give the path of {missing}.")]
    if field.startswith("text_encoder") and is_hub_name(path):
        return []
    if not os.path.exists(path):
        return [Problem(field, f"{path} does not exist. Check the path.")]
    try:
        info = identify(path)
    except UserError as error:
        return [Problem(field, error.message)]
    if info.kind == kind and info.unsupported:
        return [Problem(field, info.unsupported)]
    if info.kind != kind:
        return [Problem(field, f"{Path(path).name} is {info.summary}, not {_KIND_WORDS[kind]}. Choose another file.")]
    complaint = compare(info) if compare else None
    return [Problem(field, f"{Path(path).name} {complaint}")] if complaint else []


def _check_loras(options: GenerateOptions) -> list[Problem]:
    problems = []
    if len(options.lora_multiplier) > len(options.lora_weight):
        problems.append(
            Problem(
                "lora_multiplier",
                f"{len(options.lora_multiplier)} strengths for {len(options.lora_weight)} LoRAs. Give one for each.",
            )
        )
    for path in options.lora_weight:
        if not os.path.isfile(path):
            problems.append(Problem("lora_weight", f"{path} does not exist. Check the path."))
            continue
        try:
            info = identify(path)
        except UserError as error:
            problems.append(Problem("lora_weight", error.message))
            continue
        if info.unsupported and info.kind == "lora":
            problems.append(Problem("lora_weight", info.unsupported))
        if info.kind != "lora":
            problems.append(
                Problem("lora_weight", f"{Path(path).name} is {info.summary}, not a LoRA. Choose another file.")
            )
    return problems


def _check_latent_file(path: str) -> list[Problem]:
    if not os.path.isfile(path):
        return [Problem("latent_path", f"{path} does not exist. Check the path.")]
    try:
        header = read_header(path)
    except UserError as error:
        return [Problem("latent_path", error.message)]
    tensor = header.tensors.get("latent")
    if tensor is None or len(tensor.shape) != 4 or tensor.shape[0] != 16:
        return [
            Problem(
                "latent_path", f"{Path(path).name} has no tensor 'latent' of shape [16, F, H, W]. Choose another file."
            )
        ]
    return []


def _check_outputs(plan: Plan) -> list[Problem]:
    """One look at each folder: may a file be created there, and does the disk hold all that will be written?"""
    folders: dict[Path, list[ClipRequest]] = {}
    for clip in plan.clips:
        folders.setdefault(clip.output.parent, []).append(clip)
    problems: list[Problem] = []
    for folder, clips in folders.items():
        try:
            check_writable(clips[0].output, "output")
            require_free_space(folder, sum(map(_bytes_needed, clips)) + _SPARE_BYTES, "output")
        except UserError as error:
            problems += error.problems
    return problems


def _check_folder(folder: str, field: str) -> list[Problem]:
    try:
        check_writable(Path(folder) / "file", field)
    except UserError as error:
        return list(error.problems)
    return []


def _bytes_needed(clip: ClipRequest) -> int:
    """An upper estimate: half a byte a pixel and frame for a clip, three for images, which are stored without loss."""
    pixels = clip.frames * clip.width * clip.height
    return 3 * pixels if clip.options.output_type == "images" or clip.frames == 1 else pixels // 2
