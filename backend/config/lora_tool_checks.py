"""What can be said of a request to the LoRA tool before a weight is read."""

from __future__ import annotations

import os
from pathlib import Path

from backend.config.lora_tool import AverageOptions, CheckOptions, ConvertOptions, MergeOptions, ResizeOptions
from backend.config.options import Options
from backend.errors import Problem, UserError
from backend.files import check_writable

_NEEDED = {
    "lora_weight": "Give the LoRA file.",
    "output": "Give the path of the file to write.",
    "target": "Say which names to write: kohya, diffusers or comfyui.",
    "dit": "Give the DiT checkpoint to add the LoRAs to.",
    "new_rank": "Give the rank that the layers are to have.",
}
# Where the DiT only tells the sizes, it may be left out.
_DIT_OPTIONAL = (AverageOptions, CheckOptions, ConvertOptions, ResizeOptions)


def check_lora_tool(options: Options) -> list[Problem]:
    """Everything that is missing, contradictory or impossible in the options of a verb, each with its field."""
    fields = type(options).model_fields
    optional = {"dit"} if isinstance(options, _DIT_OPTIONAL) else set()
    problems = [
        Problem(name, sentence)
        for name, sentence in _NEEDED.items()
        if name in fields and name not in optional and not getattr(options, name)
    ]
    inputs = _inputs(options)
    problems += [
        Problem(name, f"{path} does not exist. Check the path.") for name, path in inputs if not Path(path).exists()
    ]
    problems += _output_problems(options, [path for _, path in inputs])
    if isinstance(options, MergeOptions) and len(options.lora_multiplier) not in (0, len(options.lora_weight)):
        counts = f"{len(options.lora_multiplier)} strengths for {len(options.lora_weight)} LoRAs"
        problems.append(Problem("lora_multiplier", f"{counts}. Give one for each, in the same order, or none."))
    if isinstance(options, AverageOptions):
        problems += _average_problems(options)
    if isinstance(options, CheckOptions) and options.dit and options.task:
        problems.append(Problem("task", "names the demo model, and --dit another one. Give one of them."))
    if isinstance(options, ConvertOptions | CheckOptions) and options.architecture and options.dit:
        problems.append(Problem("architecture", "is told by the header of --dit. Give one of them."))
    return problems


def _inputs(options: Options) -> list[tuple[str, str]]:
    found = []
    for name in ("lora_weight", "dit"):
        value = getattr(options, name, None) or []
        found += [(name, path) for path in ([value] if isinstance(value, str) else value)]
    return found


def _output_problems(options: Options, inputs: list[str]) -> list[Problem]:
    output = getattr(options, "output", None)
    if not output:
        return []
    path = Path(output)
    folder = isinstance(options, MergeOptions) and path.suffix != ".safetensors"
    if not folder and path.suffix != ".safetensors":
        return [Problem("output", f"{path} must end in .safetensors.")]
    if any(os.path.realpath(path) == os.path.realpath(each) for each in inputs):
        return [Problem("output", f"{path} is an input too. Choose another name, so that the input stays.")]
    if folder and path.exists():
        return [Problem("output", f"{path} exists already. Give a new folder, or a file that ends in .safetensors.")]
    try:
        check_writable(path, "output")
    except UserError as error:
        return list(error.problems)
    return []


def _average_problems(options: AverageOptions) -> list[Problem]:
    problems = []
    if len(options.lora_weight) == 1:
        problems.append(Problem("lora_weight", "One file has no average. Give two or more checkpoints of a run."))
    if options.sigma_rel is not None and options.beta2 is not None:
        problems.append(Problem("beta2", "--sigma_rel sets the weights by itself. Give one of them."))
    return problems
