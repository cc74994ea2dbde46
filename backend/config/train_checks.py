"""Everything that can be wrong with a request to train, found before any weight is loaded, and without torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from backend.config.cache import CacheLatentsOptions
from backend.config.cache_checks import check_dataset_options
from backend.config.checks import VAE_EXAMPLE, check_weight, fits_task, weight_paths
from backend.config.generate import GenerateOptions
from backend.config.options import from_mapping, load_toml
from backend.config.prompts import plan_clips
from backend.config.tasks import TASKS
from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values, network_arguments, steps_of
from backend.errors import Problem, Problems, UserError
from backend.files import check_writable

NETWORK_MODULES = ("networks.lora_kandinsky", "lora")
_OTHER_NETWORKS = ("loha", "lokr", "lycoris", "dora", "oft")
_ANY_LENGTH = 10**9
Check = Callable[[TrainOptions], list[Problem]]


def check_train(options: TrainOptions, run_dir: str | Path | None = None) -> list[Problem]:
    """Every problem of `options` and of the dataset that they name; an empty list means that training can start.

    Caches are not looked at here (that takes a scan), and neither are the numbers inside weights.
    """
    if options.show_timesteps is not None:
        return check_timesteps(options)
    problems: list[Problem] = []
    checks: tuple[Check, ...] = (
        _check_model, _check_dataset, check_timesteps, _check_arguments, _check_network, _check_memory, _check_samples,
        _check_saving, _check_tracking,
    )  # fmt: skip
    for check in checks:
        problems += check(options)
    if options.output_dir is None and run_dir is None:
        problems.append(Problem("output_dir", "is missing. Give the folder for the LoRA files."))
    elif options.output_dir is not None:
        problems += _writable(Path(options.output_dir) / "lora.safetensors", "output_dir")
    return list(dict.fromkeys(problems))


def makes_samples(options: TrainOptions) -> bool:
    """Whether clips are made while training."""
    often = options.sample_every_n_steps or options.sample_every_n_epochs or options.sample_at_first
    return options.sample_prompts is not None and bool(often)


def check_timesteps(options: TrainOptions) -> list[Problem]:
    """Contradictions of the noise levels that are trained."""
    low = 0.0 if options.min_timestep is None else options.min_timestep
    high = 1000.0 if options.max_timestep is None else options.max_timestep
    problems = []
    if low >= high:
        problems.append(Problem("min_timestep", f"{low:g} is not below max_timestep, {high:g}. Change one of them."))
    if options.preserve_distribution_shape and options.min_timestep is None and options.max_timestep is None:
        problems.append(
            Problem("preserve_distribution_shape", "needs --min_timestep or --max_timestep. Give one of them.")
        )
    return problems


def _check_model(options: TrainOptions) -> list[Problem]:
    if options.task is None:
        return [Problem("task", "is missing. Name the model that is trained, for example k5-pro-t2v-5s-sd.")]
    task, paths = TASKS[options.task], weight_paths(options)
    example = f"{VAE_EXAMPLE} for {task.name}"
    problems = check_weight("dit", paths.dit, "dit", f"{task.checkpoint} for {task.name}", fits_task(task))
    samples = makes_samples(options)
    if samples or options.cache_missing or options.vae is not None:
        problems += check_weight("vae", paths.vae, "vae", example)
    for field, kind in (("text_encoder_qwen", "text_encoder"), ("text_encoder_clip", "clip")):
        if samples or options.cache_missing or getattr(options, field) is not None:
            problems += check_weight(field, getattr(paths, field), kind, example)
    if options.mixed_precision == "fp16":
        problems.append(
            Problem("mixed_precision", "fp16 overflows in this model, which was made in bfloat16. Use bf16 or no.")
        )
    if task.mode == "t2v" and options.i2v_mode != "first":
        problems.append(Problem("i2v_mode", f"{task.name} has no given frames. Choose an i2v task, or leave it out."))
    if task.mode == "t2v" and options.i2v_cond_prob != 1.0:
        problems.append(
            Problem("i2v_cond_prob", f"{task.name} has no given frames. Choose an i2v task, or leave it out.")
        )
    return problems


def _check_dataset(options: TrainOptions) -> list[Problem]:
    looked = CacheLatentsOptions(
        dataset_config=options.dataset_config,
        nabla_resize=options.nabla_resize,
        nabla_stretch=options.nabla_stretch,
        check=not options.cache_missing,
    )
    problems = check_dataset_options(looked)
    if options.persistent_data_loader_workers and options.max_data_loader_n_workers == 0:
        problems.append(Problem("persistent_data_loader_workers", "needs --max_data_loader_n_workers of 1 or more."))
    return problems


def _check_arguments(options: TrainOptions) -> list[Problem]:
    problems: list[Problem] = []
    for field in ("optimizer_args", "lr_scheduler_args"):
        try:
            key_values(getattr(options, field), field)
        except Problems as error:
            problems += error.problems
    for field in ("lr_warmup_steps", "lr_decay_steps"):
        try:
            steps_of(getattr(options, field), _ANY_LENGTH, field)
        except UserError as error:
            problems += error.problems
    if not options.optimizer_type.strip():
        problems.append(Problem("optimizer_type", "is empty. Use AdamW, AdamW8bit, Adafactor or a class."))
    if options.lr_scheduler == "adafactor" and options.optimizer_type.lower() != "adafactor":
        problems.append(Problem("lr_scheduler", "adafactor belongs to --optimizer_type Adafactor. Choose another one."))
    return problems


def _check_network(options: TrainOptions) -> list[Problem]:
    problems: list[Problem] = []
    if options.network_module not in NETWORK_MODULES:
        other = any(name in options.network_module.lower() for name in _OTHER_NETWORKS)
        reason = (
            "LoHa, LoKr and their relatives are not supported for Kandinsky 5" if other else "is not a network here"
        )
        problems.append(Problem("network_module", f"{options.network_module}: {reason}. Use networks.lora_kandinsky."))
    try:
        network_arguments(options)
    except Problems as error:
        problems += error.problems
    if options.dim_from_weights and options.network_weights is None:
        problems.append(Problem("dim_from_weights", "needs --network_weights. Give the LoRA file to start from."))
    if options.network_weights is not None:
        problems += check_weight("network_weights", options.network_weights, "lora", "a LoRA file")
    for path in options.base_weights:
        problems += check_weight("base_weights", path, "lora", "a LoRA file")
    if len(options.base_weights_multiplier) > len(options.base_weights):
        problems.append(
            Problem("base_weights_multiplier", "has more strengths than --base_weights has files. Give one for each.")
        )
    return problems


def _check_memory(options: TrainOptions) -> list[Problem]:
    problems = []
    if options.attention == "sage_attn":
        problems.append(Problem("attention", "sage_attn has no gradients, so it cannot train. Use sdpa or flash_attn."))
    task = TASKS[options.task] if options.task is not None else None
    nabla = options.force_nabla_attention or bool(task and task.nabla)
    for field in ("nabla_method", "nabla_P", "nabla_wT", "nabla_wH", "nabla_wW"):
        if getattr(options, field) is not None and not nabla:
            problems.append(Problem(field, "belongs to NABLA. Add --force_nabla_attention, or leave it out."))
    return problems


def _check_samples(options: TrainOptions) -> list[Problem]:
    often = [name for name in ("sample_every_n_steps", "sample_every_n_epochs") if getattr(options, name)]
    if options.sample_prompts is None:
        wanted = [*often, *(["sample_at_first"] if options.sample_at_first else [])]
        return [Problem(name, "needs --sample_prompts. Give a prompt file, or leave it out.") for name in wanted]
    if options.task is None:
        return []
    request = {"task": options.task, "from_file": options.sample_prompts, "output": "samples"}
    try:
        plan_clips(from_mapping(GenerateOptions, request))
    except Problems as error:
        return [Problem("sample_prompts", f"{problem.message}") for problem in error.problems]
    return []


def _check_saving(options: TrainOptions) -> list[Problem]:
    problems = []
    name = options.output_name
    if (
        not name.strip()
        or name != Path(name).name
        or name.startswith(".")
        or any(letter in name for letter in '<>:"|?*\\')
    ):
        problems.append(
            Problem("output_name", f"{name[:60]!r} cannot be the start of a file name. Use letters, digits, - and _.")
        )
    pairs = (
        ("save_last_n_epochs", "save_every_n_epochs"),
        ("save_last_n_steps", "save_every_n_steps"),
        ("save_last_n_epochs_state", "save_every_n_epochs"),
        ("save_last_n_steps_state", "save_every_n_steps"),
    )
    for field, needed in pairs:
        if getattr(options, field) is not None and getattr(options, needed) is None:
            problems.append(Problem(field, f"needs --{needed}, or nothing is saved that could be left. Give that too."))
    resume = options.resume
    if resume is not None and resume != "latest" and not os.path.isdir(resume):
        problems.append(Problem("resume", f"{resume} is no folder. Give a state folder, or latest."))
    return problems


def _check_tracking(options: TrainOptions) -> list[Problem]:
    problems = []
    if options.logging_dir is not None:
        problems += _writable(Path(options.logging_dir) / "events", "logging_dir")
    elif options.log_with in ("tensorboard", "all"):
        problems.append(Problem("log_with", "needs --logging_dir. Give the folder for the curves."))
    if options.log_tracker_config is not None:
        try:
            load_toml(options.log_tracker_config, "log_tracker_config")
        except UserError as error:
            problems += error.problems
    return problems


def _writable(path: Path, field: str) -> list[Problem]:
    try:
        check_writable(path, field)
    except UserError as error:
        return list(error.problems)
    return []
