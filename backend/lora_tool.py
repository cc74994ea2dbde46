"""Look at LoRA files and change them: `python -m backend.lora_tool inspect|convert|merge|average|resize|check ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from backend.config.lora_tool import (
    VERBS,
    AverageOptions,
    CheckOptions,
    ConvertOptions,
    InspectOptions,
    MergeOptions,
    ResizeOptions,
)
from backend.config.lora_tool_checks import check_lora_tool
from backend.config.options import Options
from backend.config.tasks import TASKS, default_weights
from backend.entry import run_entry
from backend.errors import Problem, Problems
from backend.progress import Reporter

ENTRY = "lora_tool"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0 done, 2 a mistake in the request, 1 an engine fault."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    if verb in VERBS:
        help_text, model = VERBS[verb]
        return run_entry(model, f"{ENTRY} {verb}", f"LoRA files: {help_text}.", words[1:], _work)
    usage = "".join(f"\n  {name:<8} {text}" for name, (text, _) in VERBS.items())
    usage = f"python -m backend.{ENTRY} <verb> ..., each with its own --help:{usage}\n"
    if verb in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    sys.stderr.write(f"{verb!r} is not a verb.\n{usage}" if verb else usage)
    return Problems.exit_code


def _work(options: Options, reporter: Reporter, run_dir: Path | None) -> list[str]:
    problems = check_lora_tool(options)
    if problems:
        raise Problems(problems)
    if isinstance(options, InspectOptions):
        return _inspect(options)
    if isinstance(options, ConvertOptions):
        return _convert(options, reporter)
    if isinstance(options, MergeOptions):
        return _merge(options, reporter)
    if isinstance(options, AverageOptions):
        return _average(options, reporter)
    if isinstance(options, ResizeOptions):
        return _resize(options, reporter)
    assert isinstance(options, CheckOptions)
    return _check(options, reporter)


# torch is imported by the verbs themselves, so that --help and mistakes are answered without waiting for it.


def _inspect(options: InspectOptions) -> list[str]:
    from backend.lora.describe import describe, describe_json, describe_text
    from backend.lora.formats import read_lora

    report = describe(read_lora(str(options.lora_weight)))
    sys.stdout.write((describe_json if options.as_json else describe_text)(report, options.layers))
    return []


def _convert(options: ConvertOptions, reporter: Reporter) -> list[str]:
    from backend.lora.architecture import fit_lora
    from backend.lora.convert import original_layers, write_converted
    from backend.lora.formats import read_lora

    assert options.target is not None
    reporter.phase("load", f"Reading {options.lora_weight}")
    file = read_lora(str(options.lora_weight))
    fit = fit_lora(file, options.architecture, options.dit)
    layers = original_layers(file, fit.layers)
    write_converted(str(options.output), layers, options.target, file.metadata, options.save_precision)
    reporter.say(
        f"Written: {options.output} ({options.target} names, {fit.coverage} layers of the {fit.architecture} model)"
    )
    return [str(options.output)]


def _merge(options: MergeOptions, reporter: Reporter) -> list[str]:
    from backend.lora.merge_checkpoint import merge_checkpoint

    strengths = options.lora_multiplier or [1.0] * len(options.lora_weight)
    reporter.phase("save", f"Merging {len(strengths)} LoRA{'s' * (len(strengths) > 1)} into {options.dit}")
    written = merge_checkpoint(
        str(options.dit),
        list(zip(options.lora_weight, strengths, strict=True)),
        str(options.output),
        options.save_precision,
        lambda done, total: reporter.progress(done, total, "tensors"),
    )
    for path in written:
        reporter.say(f"Written: {path}")
    return [str(path) for path in written]


def _average(options: AverageOptions, reporter: Reporter) -> list[str]:
    from backend.lora.architecture import fit_lora
    from backend.lora.average import average_layers, ema_weights, power_weights, sorted_by_step
    from backend.lora.convert import original_layers, write_converted
    from backend.lora.formats import read_lora

    reporter.phase("load", f"Reading {len(options.lora_weight)} checkpoints")
    files = [read_lora(path) for path in options.lora_weight]
    files = files if options.no_sort else sorted_by_step(files)
    if options.sigma_rel is not None:
        weights = power_weights(len(files), options.sigma_rel)
    else:
        weights = ema_weights(len(files), options.beta, options.beta2)
    for file, weight in zip(files, weights, strict=True):
        reporter.say(f"  {weight:8.4f}  {file.path.name}")
    layers = average_layers(
        [(file.path.name, original_layers(file, fit_lora(file, dit=options.dit).layers)) for file in files], weights
    )
    last = files[-1]
    write_converted(str(options.output), layers, last.format, last.metadata, options.save_precision)
    reporter.say(f"Written: {options.output}")
    return [str(options.output)]


def _resize(options: ResizeOptions, reporter: Reporter) -> list[str]:
    from backend.lora.architecture import fit_lora
    from backend.lora.convert import original_layers, write_converted
    from backend.lora.formats import read_lora
    from backend.lora.resize import resize_pair

    assert options.new_rank is not None
    reporter.phase("load", f"Reading {options.lora_weight}")
    file = read_lora(str(options.lora_weight))
    layers = original_layers(file, fit_lora(file, dit=options.dit).layers)
    resized = {name: resize_pair(pair, options.new_rank, options.keep_energy) for name, pair in layers.items()}
    pairs = {name: each.weights for name, each in resized.items()}
    # Rank and alpha are told anew by the writer.
    metadata = {key: text for key, text in file.metadata.items() if key not in ("ss_network_dim", "ss_network_alpha")}
    write_converted(str(options.output), pairs, file.format, metadata, options.save_precision)
    kept = sorted(each.kept for each in resized.values())
    ranks = sorted({pair.rank for pair in pairs.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    reporter.say(
        f"Written: {options.output} (rank {file.rank} -> {span}; each layer keeps {kept[0] * 100:.2f} % or more of its "
        f"squared singular values, half of them {kept[len(kept) // 2] * 100:.2f} %)"
    )
    return [str(options.output)]


def _check(options: CheckOptions, reporter: Reporter) -> list[str]:
    from backend.lora.architecture import fit_lora
    from backend.lora.formats import read_lora

    dit = default_weights(TASKS[options.task]).dit if options.task else options.dit
    file = read_lora(str(options.lora_weight))
    fit = fit_lora(file, options.architecture, dit)
    sys.stdout.write(f"{file.summary}\n")
    loads = f"{len(file.layers)} of {len(file.layers)} keys"
    sys.stdout.write(f"Loads here with {loads} ({fit.coverage} layers of the {fit.architecture} model).\n")
    if dit is None or options.header_only:
        sys.stdout.write("No model was run: names and shapes only. Give --dit to measure the difference.\n")
        return []
    from backend.lora.verify import measure_difference

    reporter.phase("load", f"Loading {dit}")
    found = measure_difference(dit, str(options.lora_weight), options.lora_multiplier, options.seed, options.device)
    sys.stdout.write(
        f"Output differs from base by {found.relative * 100:.3g} % at strength {options.lora_multiplier:g} "
        f"({found.dtype} on {found.device}); at strength 0 it is {'the' if found.zero_is_base else 'NOT the'} base's "
        "bit for bit.\n"
    )
    if found.relative == 0.0:
        reporter.warning(Problem("lora_weight", "changes nothing at all: it is untrained, or its strength is 0."))
    elif found.relative > 1.0:
        reporter.warning(Problem("lora_weight", "changes more than the base's output itself. Try a lower strength."))
    return []


if __name__ == "__main__":
    sys.exit(main())
