"""Writes docs/options.md and docs/dataset.md by definitions: `python -m backend.config.docs [--check | --flags]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.config.cache import CacheLatentsOptions, CacheTextOptions, CheckDatasetOptions
from backend.config.dataset_docs import DATASET_PAGE, dataset_page
from backend.config.generate import GenerateOptions
from backend.config.lora_tool import VERBS
from backend.config.options import Options, OptionSpec, build_parser, specs
from backend.config.train import TrainOptions
from backend.files import write_atomic

# The tools of the command line: module name below `backend` -> what it does, and its options.
TOOLS: Mapping[str, tuple[str, type[Options]]] = {
    "kandinsky5_generate_video": ("Generate video", GenerateOptions),
    "kandinsky5_check_dataset": ("Look a dataset over", CheckDatasetOptions),
    "kandinsky5_cache_latents": ("Cache latents", CacheLatentsOptions),
    "kandinsky5_cache_text_encoder_outputs": ("Cache captions", CacheTextOptions),
    "kandinsky5_train_network": ("Train a LoRA", TrainOptions),
    **{f"lora_tool {verb}": (f"LoRA tool: {text}", model) for verb, (text, model) in VERBS.items()},
}

OPTIONS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"

_INTRODUCTION = """# Options

Written by `make docs` from the option definitions; do not edit by hand.

An option is a flag on the command line (`--steps 30`), a key in the file given by `--config_file` (`steps = 30`) and a
field in the app. Flags beat the file, the file beats the defaults. A switch (true / false) is a flag without a value;
`--no_<name>` turns it off again. "Task" as a default means that the value comes from the chosen `--task`.
"""


def options_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION]
    for module, (title, model) in TOOLS.items():
        parts.append(f"## {title}\n\n`python -m backend.{module}`\n")
        for group in dict.fromkeys(spec.group for spec in specs(model)):
            parts.append(_group_table(group, [spec for spec in specs(model) if spec.group == group]))
        parts.append(_run_table(module, model))
    return "\n".join(parts)


def _group_table(group: str, members: list[OptionSpec]) -> str:
    rows = [
        [_flag_cell(spec), _type_cell(spec), _default_cell(spec), _range_cell(spec), _cell(spec.help)]
        for spec in members
    ]
    title = "LoRA" if group == "lora" else group.capitalize()
    return f"### {title}\n\n" + _table(["Option", "Type", "Default", "Range", "What it does"], rows)


def _run_table(module: str, model: type[Options]) -> str:
    names = {spec.name for spec in specs(model)}
    rows = [
        [f"`{action.option_strings[0]}`", _cell(action.help or "")]
        for action in build_parser(model, module, "")._actions
        if action.option_strings and action.dest not in names and not action.dest.startswith("switch ")
        if action.dest != "help"
    ]
    return "### Run\n\n" + _table(["Option", "What it does"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _flag_cell(spec: OptionSpec) -> str:
    flags = [spec.name, *spec.aliases, *spec.switches]
    return ", ".join(f"`--{flag}`" for flag in flags)


def _type_cell(spec: OptionSpec) -> str:
    kinds = {"file": "file", "folder": "folder", "weights": "file, folder or name", "new_file": "new file"}
    words = {"bool": "switch", "int": "whole number", "float": "number", "str": "text"}
    base = kinds[spec.path] if spec.path else words.get(spec.kind, "")
    if spec.kind == "choice":
        base = "one of " + ", ".join(f"`{choice}`" for choice in spec.choices)
    return f"list: {base}" if spec.is_list else base


def _default_cell(spec: OptionSpec) -> str:
    if spec.default is None or spec.default == []:
        return "Task" if "default: the task's" in spec.help else "none"
    if isinstance(spec.default, bool):
        return "off" if not spec.default else "on"
    return f"`{spec.default}`"


def _range_cell(spec: OptionSpec) -> str:
    low = f"≥ {_number(spec.minimum)}" if spec.minimum is not None else ""
    low = f"> {_number(spec.exclusive_minimum)}" if spec.exclusive_minimum is not None else low
    high = f"≤ {_number(spec.maximum)}" if spec.maximum is not None else ""
    return " ".join(part for part in (", ".join(filter(None, (low, high))), spec.unit) if part)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def flag_table() -> dict[str, dict[str, Any]]:
    """Every flag of every tool with its type, default and choices, as the golden file of the tests keeps it."""
    return {module: _flags(module, model) for module, (_, model) in TOOLS.items()}


def _flags(module: str, model: type[Options]) -> dict[str, Any]:
    by_name = {spec.name: spec for spec in specs(model)}
    table: dict[str, Any] = {}
    for action in build_parser(model, module, "")._actions:
        spec = by_name.get(action.dest)
        for flag in action.option_strings:
            if spec is None:
                sets = {"sets": action.dest.removeprefix("switch "), "to": action.const} if action.const else {}
                table[flag] = {"type": "switch" if sets or action.nargs == 0 else "str", **sets}
            elif action.const is False:
                table[flag] = {"type": "switch", "sets": spec.name, "to": False}
            else:
                table[flag] = {
                    "type": f"list of {spec.kind}" if spec.is_list else spec.kind,
                    "default": spec.default,
                    "choices": list(spec.choices),
                }
    return table


def flags_text() -> str:
    """`flag_table` as JSON with one line a flag, so that a diff shows what changed."""
    tools = []
    for module, table in flag_table().items():
        rows = ",\n".join(f"    {json.dumps(flag)}: {json.dumps(row)}" for flag, row in table.items())
        tools.append(f"  {json.dumps(module)}: {{\n{rows}\n  }}")
    return "{\n" + ",\n".join(tools) + "\n}"


def main(argv: list[str]) -> int:
    """Write the pages, compare them (`--check`) or print the flags as JSON (`--flags`); 1 when one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m backend.config.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail when a page is out of date.")
    parser.add_argument("--flags", action="store_true", help="Print every flag as JSON, for tests/golden/flags.json.")
    given = parser.parse_args(argv)
    if given.flags:
        print(flags_text())
        return 0
    outdated = 0
    for path, page in ((OPTIONS_PAGE, options_page()), (DATASET_PAGE, dataset_page())):
        current = path.read_text("utf-8") if path.is_file() else ""
        if not given.check:
            write_atomic(path, page)
        elif current != page:
            outdated = 1
            print(f"docs/{path.name} is out of date. Run: make docs", file=sys.stderr)
    return outdated


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
