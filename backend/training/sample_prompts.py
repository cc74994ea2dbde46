"""Which clips are made while training: `--sample_prompts`, read by the rules of generation's prompt files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from backend.config.generate import GenerateOptions
from backend.config.options import from_mapping
from backend.config.prompts import ClipRequest, Plan, plan_clips
from backend.config.tasks import TASKS
from backend.config.train import TrainOptions
from backend.errors import Problem, Problems, UserError
from backend.model.nabla import check_nabla_size
from backend.training.draws import seed_of
from backend.training.transformer import base_weights, nabla_config

FIELD = "sample_prompts"
_DTYPES = {"no": "float32", "bf16": "bfloat16"}


def plan_samples(options: TrainOptions, folder: Path, seed: int) -> Plan:
    """Settle every clip of the prompt file; their outputs lie in `folder`, under names that do not say the step yet.

    A prompt without a seed takes `seed`, so that its clips of different steps can be compared; one with the seed -1
    gets a number that follows from `seed` and its place in the file, for the same reason.

    Raises:
        Problems: field "sample_prompts"; bad lines, missing images, sizes that do not fit.
    """
    try:
        plan = plan_clips(sample_options(options, folder, seed))
    except Problems as error:
        raise Problems([_of_prompts(problem) for problem in error.problems]) from None
    clips = [_with_fixed_seed(clip, seed, number) for number, clip in enumerate(plan.clips, start=1)]
    if options.task is not None and nabla_config(options, TASKS[options.task]) is not None:
        _check_nabla_sizes(clips)
    return Plan(clips, [_of_prompts(notice) for notice in plan.notices])


def sample_options(options: TrainOptions, folder: Path, seed: int) -> GenerateOptions:
    """The options with which generation would make these clips from the base model and its merged LoRAs."""
    merged = base_weights(options)
    values = {
        "task": options.task,
        "dit": options.dit,
        "vae": options.vae,
        "text_encoder_qwen": options.text_encoder_qwen,
        "text_encoder_clip": options.text_encoder_clip,
        "from_file": options.sample_prompts,
        "output": str(folder),
        "seed": seed,
        "scheduler_scale": options.scheduler_scale,
        "lora_weight": [path for path, _ in merged],
        "lora_multiplier": [strength for _, strength in merged],
        "device": options.device,
        "dtype": _DTYPES.get(options.mixed_precision or ""),
        "attention": options.attention,
        "fp8_base": options.fp8_base or options.fp8_scaled,
        "blocks_to_swap": options.blocks_to_swap,
        "offload_dit_during_sampling": options.offload_dit_during_sampling,
        "vae_tiling": options.vae_tiling,
        "text_cache_dir": options.text_cache_dir,
        "rope_bf16_rounding": options.rope_bf16_rounding,
    }
    return from_mapping(GenerateOptions, {name: value for name, value in values.items() if value is not None})


def _of_prompts(problem: Problem) -> Problem:
    shown = problem.field in (None, "from_file", "prompt", "output")
    return Problem(FIELD, problem.message if shown else f"{problem.field}: {problem.message}")


def _with_fixed_seed(clip: ClipRequest, seed: int, number: int) -> ClipRequest:
    return replace(clip, seed=seed_of(seed, number, "sample")) if clip.options.seed == -1 else clip


def _check_nabla_sizes(clips: list[ClipRequest]) -> None:
    problems = []
    for number, clip in enumerate(clips, start=1):
        try:
            check_nabla_size(clip.height // 8, clip.width // 8)
        except UserError as error:
            problems.append(Problem(FIELD, f"prompt {number}: {error.message}"))
    if problems:
        raise Problems(problems)
