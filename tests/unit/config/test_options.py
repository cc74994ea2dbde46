"""Options: flags, TOML and defaults give one result; whatever cannot be carried is refused, never changed."""

from __future__ import annotations

import functools
import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.config import options as options_module
from backend.config.generate import GenerateOptions
from backend.config.options import (
    from_mapping,
    load_toml,
    parse_command_line,
    specs,
    to_command,
    to_command_text,
    to_toml,
)
from backend.errors import Problems, UserError

ENTRY = "kandinsky5_generate_video"


def _parse(*words: str) -> GenerateOptions:
    return parse_command_line(GenerateOptions, words, "k5", "test").options


def _refused(*words: str) -> dict[str | None, str]:
    with pytest.raises(Problems) as caught:
        _parse(*words)
    return {problem.field: problem.message for problem in caught.value.problems}


def _refused_values(**values: Any) -> dict[str | None, str]:
    with pytest.raises(Problems) as caught:
        from_mapping(GenerateOptions, values)
    return {problem.field: problem.message for problem in caught.value.problems}


def _toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.toml"
    path.write_bytes(text.encode())
    return path


# --- precedence ---------------------------------------------------------------------------------------------------


def test_flags_beat_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    file = _toml(tmp_path, 'steps = 7\nprompt = "from file"\nfp8_base = true\nattention = "sdpa"\n')
    options = _parse("--config_file", str(file), "--steps", "9", "--no_fp8_base", "--xformers")
    assert (options.steps, options.prompt, options.seed) == (9, "from file", 42)
    assert (options.fp8_base, options.attention) == (False, "xformers")
    assert _parse("--config_file", str(file)).fp8_base is True


def test_a_flag_also_beats_a_switch_of_the_file(tmp_path: Path) -> None:
    file = _toml(tmp_path, "flash_attn = true\n")
    assert _parse("--config_file", str(file)).attention == "flash_attn"
    assert _parse("--config_file", str(file), "--sdpa").attention == "sdpa"
    assert _parse("--config_file", str(file), "--attention", "auto").attention == "auto"


def test_tables_of_the_file_are_flattened(tmp_path: Path) -> None:
    file = _toml(tmp_path, 'seed = 1\n[clip]\nwidth = 64\n[model]\ntask = "k5-demo-t2v"\n[prompt]\nprompt = "cat"\n')
    options = _parse("--config_file", str(file))
    assert (options.seed, options.width, options.task, options.prompt) == (1, 64, "k5-demo-t2v", "cat")
    with pytest.raises(UserError, match="gives width twice"):
        load_toml(_toml(tmp_path, "width = 1\n[clip]\nwidth = 2\n"))


def test_aliases_and_lists() -> None:
    options = _parse("--i", "a.png", "--lora_weight", "a", "b", "--lora_weight", "c", "--lora_multiplier", "1", "-0.5")
    assert options.image == "a.png"
    assert options.lora_weight == ["a", "b", "c"]
    assert options.lora_multiplier == [1.0, -0.5]


def test_command_line_names_its_files() -> None:
    line = parse_command_line(GenerateOptions, ["--run_dir", "r", "--prompt", "x"], "k5", "test")
    assert (line.run_dir, line.config_file) == ("r", None)


# --- switches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "flash_attn", "flash3", "sage_attn", "xformers"])
def test_switches_are_the_option(name: str) -> None:
    assert _parse(f"--{name}").attention == name
    assert from_mapping(GenerateOptions, {name: True}).attention == name
    assert from_mapping(GenerateOptions, {name: False}).attention == "auto"
    assert _parse(f"--{name}", "--attention", name).attention == name


def test_contradictions_are_refused_in_every_order() -> None:
    assert "exclude each other" in _refused("--sdpa", "--flash_attn")["attention"]
    assert "exclude each other" in _refused("--sdpa", "--attention", "xformers")["attention"]
    assert "contradicts" in _refused_values(sdpa=True, flash_attn=True)["flash_attn"]
    assert "contradicts" in _refused_values(attention="xformers", sdpa=True)["sdpa"]
    assert "contradicts" in _refused_values(sdpa=True, attention="xformers")["sdpa"]
    assert "true or false" in _refused_values(sdpa="yes")["sdpa"]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_with_their_fields(tmp_path: Path) -> None:
    file = _toml(tmp_path, 'widht = 64\nheight = "tall"\nguidance = nan\n')
    found = _refused("--config_file", str(file), "--steps", "0", "--seed", "x", "--framse", "17", "--fps", "1000")
    assert set(found) == {None, "widht", "height", "guidance", "steps", "seed", "fps"}
    assert found["widht"] == "is not an option. Did you mean width?"
    assert found[None] == "--framse is not a flag. Did you mean --frames?"
    assert found["height"] == "must be a whole number, not 'tall'."
    assert found["guidance"] == "must be a finite number, not nan."
    assert found["steps"] == "must be at least 1, not 0."
    assert found["seed"] == "must be a whole number, not 'x'."
    assert found["fps"] == "must be at most 120, not 1000."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance", "1e-4"), ("guidance", True), ("guidance", float("nan")), ("guidance", float("inf")),
        ("guidance", 10**400), ("guidance", -0.1), ("guidance", 100.1), ("guidance", [1.0]), ("guidance", "nan"),
        ("scheduler_scale", 0), ("scheduler_scale", 0.0), ("steps", 2.0), ("steps", True), ("steps", "2"),
        ("steps", 1001), ("seed", -2), ("seed", 2**63), ("width", 15), ("height", 4097), ("frames", 0),
        ("prompt", 5), ("prompt", ["a"]), ("prompt", "x" * 20_001), ("prompt", "a\0b"), ("prompt", "\ud800"),
        ("dit", "a\0b"), ("lora_weight", "a.safetensors"), ("lora_weight", [1]), ("lora_weight", ["a\0"]),
        ("lora_multiplier", ["1"]), ("lora_multiplier", [float("inf")]), ("task", "k5-pro"), ("task", None),
        ("fp8_base", 1), ("fp8_base", "true"), ("dtype", "float16"), ("output_type", "gif"), ("prompt", "--"),
        ("lora_weight", ["a", "--"]), ("run_dir", "x"), ("config_file", "x"), ("i", "a.png"), ("", 1),
    ],
)  # fmt: skip
def test_wrong_types_bounds_and_names_are_refused_at_their_field(name: str, value: Any) -> None:
    found = _refused_values(**{name: value})
    assert set(found) == {name}
    assert found[name].strip()


def test_a_whole_number_is_a_number() -> None:
    options = from_mapping(GenerateOptions, {"guidance": 5, "scheduler_scale": 3, "lora_multiplier": [1, 2]})
    assert (options.guidance, options.scheduler_scale, options.lora_multiplier) == (5.0, 3.0, [1.0, 2.0])
    assert isinstance(options.guidance, float)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "2.5"], "must be a whole number"),
        (["--steps", "1e3"], "must be a whole number"),
        (["--guidance", "five"], "must be a number"),
        (["--guidance", "nan"], "finite"),
        (["--guidance", "1e999"], "finite"),
        (["--steps", "9" * 5000], "must be a whole number"),
        (["--frame", "17"], "Did you mean --frames?"),
        (["--ste", "17"], "is not a flag"),
        (["--sdpa=1"], "sdpa"),
        (["--frames"], "frames"),
        (["cat"], "belongs to no flag"),
        (["--prompt=--"], "'--' is not a value"),
        (["--prompt", "a", "--", "b"], "-- is not a flag"),
    ],
)
def test_command_lines_that_mean_nothing(words: list[str], expected: str) -> None:
    """Abbreviations are off: --frame is not --frames."""
    assert any(expected in message for message in _refused(*words).values())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"steps = ", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b"steps = " + b"9" * 5000, "not valid TOML"),
        (b"a = " + b"[" * 20_000, "not valid TOML"),
        (b"#" * 1_000_001, "larger than 1 MB"),
        (b"steps = 1\nsteps = 2", "not valid TOML"),
    ],
)
def test_files_that_are_no_options(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "options.toml"
    path.write_bytes(content)
    assert expected in _refused("--config_file", str(path))["config_file"]


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "No such file" in _refused("--config_file", str(tmp_path / "none.toml"))["config_file"]
    assert "cannot be read" in _refused("--config_file", str(tmp_path))["config_file"]


def test_inner_tables_and_dates_are_no_options(tmp_path: Path) -> None:
    found = _refused("--config_file", str(_toml(tmp_path, "[a.b]\nsteps = 1\n[c]\nseed = 2020-01-01\n")))
    assert found.keys() == {"b", "seed"}


# --- round trips --------------------------------------------------------------------------------------------------

_LETTERS = (
    list("abZ019 \t'\"`\\/$!*?[]{}()<>|&;#%=,.:~^@+")
    + ["\n", "\r", "\r\n", "\x01", "\x1b", "\x7f", "\x85", "\u2028", "\ufeff", "\u200f", "é", "Я", "漢", "🎬", "👩‍🚀"]
    + ["--", "-", "--prompt", "--steps=1", "'''", '"""', "\\n", "\\u0041", "$(id)", "=--", " --w 5", "-1", "1e5", "@x"]
)


def _hostile(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.choice([0, 1, 1, 2, 3, 5, 20])))


def _random_values(rng: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for spec in rng.sample(specs(GenerateOptions), k=rng.randint(1, 12)):
        low = spec.minimum if spec.minimum is not None else spec.exclusive_minimum
        makers = {
            "bool": lambda: rng.random() < 0.5,
            "int": lambda low=low, spec=spec: rng.randint(int(low), int(spec.maximum)),
            "float": lambda low=low, spec=spec: (
                rng.uniform(low or 1e-9, spec.maximum or 1e9) * rng.choice([1, 0.1, 1e-12])
            ),
            "str": lambda: _hostile(rng),
            "choice": lambda spec=spec: rng.choice(spec.choices),
        }
        make = makers[spec.kind]
        values[spec.name] = [make() for _ in range(rng.randint(0, 4))] if spec.is_list else make()
    return values


def test_5000_hostile_option_sets_survive_toml_command_and_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """options -> TOML -> options and options -> command -> options are the identity; the rest is refused."""
    # One parser for all: building it is most of the time.
    monkeypatch.setattr(options_module, "build_parser", functools.cache(options_module.build_parser))
    rng, file, refused = random.Random(3), tmp_path / "options.toml", 0
    for _ in range(5000):
        values = _random_values(rng)
        try:
            options = from_mapping(GenerateOptions, values)
        except Problems as error:
            assert all("'--' is not a value" in problem.message for problem in error.problems)
            refused += 1
            continue
        assert {name: getattr(options, name) for name in values} == values
        text = to_toml(options)
        file.write_text(text, "utf-8", newline="")
        assert from_mapping(GenerateOptions, load_toml(file)) == options
        command = to_command(options, ENTRY)
        assert command[:3] == ["python", "-m", f"backend.{ENTRY}"]
        assert shlex.split(to_command_text(options, ENTRY)) == command
        assert _parse(*command[3:]) == options
    assert 0 < refused < 500


def test_a_command_through_a_real_shell(tmp_path: Path) -> None:
    """What "copy as command" gives is typed into sh and comes out equal."""
    rng = random.Random(4)
    printer = tmp_path / "python"
    printer.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys, json; print(json.dumps(sys.argv[1:]))" "$@"\n'
    )
    printer.chmod(0o755)
    shell = shutil.which("sh")
    assert shell is not None
    for _ in range(8):
        values = {"prompt": _hostile(rng) + "\n'$(id)", "lora_weight": [_hostile(rng) + "x" for _ in range(3)]}
        options = from_mapping(GenerateOptions, values)
        done = subprocess.run(
            [shell, "-c", to_command_text(options, ENTRY)], env={"PATH": str(tmp_path)}, capture_output=True, check=True
        )
        assert _parse(*json.loads(done.stdout)[2:]) == options


def test_the_toml_holds_every_value_and_defaults_too() -> None:
    options = from_mapping(GenerateOptions, {"prompt": "x", "seed": 2**63 - 1})
    text = to_toml(options)
    assert "seed = 9223372036854775807" in text
    assert "fps = 24" in text
    assert "width" not in text


def test_a_command_says_only_what_differs() -> None:
    assert to_command(GenerateOptions(), ENTRY) == ["python", "-m", f"backend.{ENTRY}"]
    options = GenerateOptions(prompt="", fp8_base=True, guidance=1.0, attention="sdpa")
    assert to_command(options, ENTRY)[3:] == ["--prompt=", "--guidance=1.0", "--attention=sdpa", "--fp8_base"]


# --- the help -----------------------------------------------------------------------------------------------------


def test_help_names_every_flag_and_starts_without_torch(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"backend.{ENTRY}", "--help"],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    for spec in specs(GenerateOptions):
        for name in (spec.name, *spec.aliases, *spec.switches):
            assert f"--{name}" in done.stdout
    assert "--config_file" in done.stdout
    assert "--run_dir" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "diffusers", "gradio"}


def test_options_are_immutable() -> None:
    options = GenerateOptions(prompt="x")
    with pytest.raises(ValueError):
        options.prompt = "y"
