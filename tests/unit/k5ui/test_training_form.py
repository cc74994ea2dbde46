"""The training form on the server: what it means, what is wrong with it, and the runs that it becomes."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.config.options import from_mapping, load_toml, parse_command_line
from backend.config.train import TrainOptions
from backend.config.train_checks import check_train
from backend.data.epochs import plan_length
from k5ui.text import training_ru
from k5ui.text.loader import LANGUAGES
from k5ui.training import presets
from k5ui.training.fields import SPECS, groups, sheets
from k5ui.training.stock import Stock
from k5ui.training.summary import Saves, count_saves, lora_parameters
from tests.unit.k5ui.caching_kit import end_run, write_journal
from tests.unit.k5ui.training_kit import Training, write_state


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """A form over a dataset whose caches are all there."""
    return Training(tmp_path)


# --- the options --------------------------------------------------------------------------------------------------


def test_every_option_has_a_place_a_name_and_help_in_both_languages() -> None:
    """None of the options is missing on the page, and nothing of the texts is left over."""
    for texts in LANGUAGES.values():
        named = {key.removeprefix("train.field.") for key in texts if key.startswith("train.field.")}
        assert named == set(SPECS)
        units = {f"train.unit.{spec.unit}" for spec in SPECS.values() if spec.unit}
        assert units == {key for key in texts if key.startswith("train.unit.")}
        assert {f"train.preset.{preset.id}" for preset in presets.PRESETS} <= set(texts)
    assert set(training_ru.HELP) == set(SPECS)


def test_the_page_gets_every_option(training: Training) -> None:
    form = training.services.training.form()
    assert {spec["name"] for spec in form["specs"]} == set(SPECS)
    shown = {group["name"] for group in form["groups"]}
    assert {spec["group"] for spec in form["specs"] if spec["place"] == "group"} == shown
    json.dumps(form, allow_nan=False)
    training.services.settings.update(language="ru")
    russian = training.services.training.form()
    assert next(spec for spec in russian["specs"] if spec["name"] == "network_dim")["label"] == "Ранг"
    assert len(sheets(training.services.training._texts())) == len(SPECS) == 109
    assert len(groups(training.services.training._texts())) == 14


@pytest.mark.parametrize("preset", presets.PRESETS, ids=lambda preset: preset.id)
def test_presets_are_options_that_fit_together(preset: presets.Preset, tmp_path: Path) -> None:
    """Only values that the engine takes: what is left to say is about missing weights and datasets."""
    options = from_mapping(TrainOptions, {"task": "k5-demo-t2v", **preset.values})
    fields = {problem.field for problem in check_train(options, tmp_path)}
    assert fields <= {"dit", "dataset_config", "sample_every_n_steps"}
    values = presets.apply(preset.id, {"output_name": "mine", "fp8_base": True, "network_dim": 4})
    assert values is not None
    assert presets.matching(values) == preset.id
    assert values["output_name"] == "mine", "what no preset sets stays"
    assert presets.matching(values | {"learning_rate": 0.5}) is None


# --- the form -----------------------------------------------------------------------------------------------------


def test_values_are_kept_and_taken_back(training: Training) -> None:
    """A form is a draft on the server; null and empty text are the default."""
    training.set(network_dim=16, learning_rate=1e-3, optimizer_args=["eps=1e-8", " "], prompts="a cat\na dog")
    state = training.state()
    assert state["values"] == {
        "task": "k5-demo-t2v",
        "network_dim": 16,
        "learning_rate": 1e-3,
        "optimizer_args": ["eps=1e-8"],
    }
    assert (state["prompts"], state["changed"]) == ("a cat\na dog", 3)
    revision = state["revision"]
    training.set(network_dim=None, optimizer_args=[], learning_rate="  ")
    state = training.state()
    assert state["values"] == {"task": "k5-demo-t2v"}
    assert state["revision"] == revision + 3


def test_a_whole_change_can_be_undone(training: Training) -> None:
    training.set(network_dim=7, output_name="mine")
    training.done("preset_train", "demo")
    assert training.state()["preset"] == "demo"
    training.done("undo_train")
    assert training.state()["values"] == {"task": "k5-demo-t2v", "network_dim": 7, "output_name": "mine"}
    assert "error" in training.ask("undo_train")
    training.done("reset_train")
    assert training.state()["values"] == {"task": "k5-demo-t2v"}


REFUSED = [
    ("nothing", 1), ("dataset_config", "/etc/passwd"), ("dataset", "x"), ("seed", {"a": 1}), ("seed", float("nan")),
    ("seed", 2**80), ("network_args", [["x"]]), ("prompts", 5), ("prompts", "x" * 300_000), ("resume", "\0"),
    ("output_name", "x" * 9000), ("optimizer_args", ["x"] * 1000),
]  # fmt: skip


def test_what_is_no_setting_is_refused(training: Training) -> None:
    """Unknown names, other kinds of values, too much of them: nothing is kept."""
    before = training.state()["values"]
    for name, value in REFUSED:
        answer = training.ask("set_train", name, value)
        assert "error" in answer or "problems" in answer, (name, value)
        assert training.state()["values"] == before


def test_problems_stand_at_their_fields(training: Training) -> None:
    """All of them at once: types and bounds first, then what contradicts."""
    training.set(network_dim=9999, learning_rate="fast", lr_scheduler="cosinus")
    assert set(training.problems()) == {"network_dim", "learning_rate", "lr_scheduler"}
    training.set(network_dim=None, learning_rate=None, lr_scheduler=None, output_name="a/b", sample_at_first=True)
    training.set(i2v_mode="first_last", save_last_n_steps=5, min_timestep=900, max_timestep=100)
    found = training.problems()
    assert set(found) == {"output_name", "sample_at_first", "i2v_mode", "save_last_n_steps", "min_timestep"}
    answer = training.ask("start_train", {"queue": False})
    assert {problem["field"] for problem in answer["problems"]} == set(found)
    assert training.services.store.list() == []


def test_prompts_are_checked_as_lines(training: Training) -> None:
    training.set(prompts="a cat\n# a remark\na dog --x 5\n--w 64", sample_every_n_steps=10)
    assert "line 3: --x is not known" in json.dumps(training.state()["problems"])
    training.set(prompts="a cat --d 5", sample_prompts="/a/prompts.txt")
    assert "Keep one" in training.problems()["sample_prompts"]


def test_without_a_dataset_it_says_so(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.studio.config.unlink()
    state = training.state()
    assert (state["dataset"], state["datasets"]) == (None, [])
    assert "Choose a dataset" in training.problems()["dataset_config"]
    assert state["summary"]["total_steps"] is None


def test_caches_that_are_missing_are_offered(tmp_path: Path) -> None:
    """The run itself can cache first; without that it does not start."""
    training = Training(tmp_path, cached=False)
    state = training.state()
    assert state["dataset"]["can_cache"]
    assert state["dataset"]["line"] == "4 items; to be cached: 4 latents, 5 captions"
    assert set(training.problems()) == {"cache_missing"}
    assert "problems" in training.ask("start_train", {"queue": False})
    training.set(cache_missing=True)
    assert training.problems() == {}
    assert training.options(training.start())["cache_missing"] is True


def test_stale_caches_count_as_missing(training: Training) -> None:
    assert training.state()["dataset"]["line"] == "4 items, all cached and up to date"
    training.studio.add("0.png", "another caption", grey=200)
    training.set(output_name="other")  # any change makes it look again at once
    os.utime(training.studio.config)
    assert "out of date" in training.state()["dataset"]["line"]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_steps_and_epochs_are_those_of_the_engine(training: Training) -> None:
    """Items x repeats in batches of a bucket; accumulation; epochs instead of steps."""
    training.studio.write_config(num_repeats=3, batch_size=5)
    training.set(max_train_epochs=7, gradient_accumulation_steps=2)
    found = training.state()["summary"]
    length = plan_length([(12, 5)], 1, 2, 1600, 7)
    assert (found["items"], found["repeats"]) == (4, [3, 3])
    assert found["batches_per_epoch"] == length.batches_per_epoch == 3
    assert found["steps_per_epoch"] == length.steps_per_epoch == 2
    assert (found["total_steps"], found["epochs"]) == (14, 7)
    assert found["text"] == "4 items × 3 in batches, 2 steps an epoch · 7 epochs, 14 steps"
    training.studio.write_config(num_repeats=3)
    training.set(gradient_accumulation_steps=None)
    assert training.state()["summary"]["text"] == "4 items × 3 = 12 steps an epoch · 7 epochs, 84 steps"


def test_the_size_of_a_lora_is_that_of_its_layers() -> None:
    """Pro: 624 layers; the demo's file of rank 32 has 3.6 MB. The closed form against a count of all layers."""
    for config in KNOWN_ARCHITECTURES.values():
        shapes = [
            shape
            for name, shape in config.expected_tensors().items()
            if "_transformer_blocks." in name and name.endswith(".weight") and len(shape) == 2
            and "modulation" not in name
        ]  # fmt: skip
        assert lora_parameters(config, 8) == 8 * sum(sum(shape) for shape in shapes)
    pro = KNOWN_ARCHITECTURES["pro"]
    assert lora_parameters(pro, 1) == 4 * (4 * 8192 + 2 * 20480) + 60 * (8 * 8192 + 2 * 20480)


@pytest.mark.parametrize(
    ("values", "loras", "states"),
    [
        ({"max_train_steps": 100}, 1, 0),
        ({"max_train_epochs": 10, "save_every_n_epochs": 2}, 5, 0),
        ({"max_train_epochs": 10, "save_every_n_epochs": 2, "save_state": True}, 5, 5),
        ({"max_train_epochs": 10, "save_every_n_epochs": 2, "save_last_n_epochs": 2, "save_state": True}, 3, 3),
        ({"max_train_steps": 100, "save_every_n_steps": 10, "save_last_n_steps": 20}, 4, 0),
        ({"max_train_steps": 100, "save_state_on_train_end": True}, 1, 1),
    ],
)
def test_files_on_the_disk_are_counted(values: dict[str, Any], loras: int, states: int) -> None:
    options = TrainOptions(**values)
    length = plan_length([(10, 1)], 1, 1, options.max_train_steps, options.max_train_epochs)
    assert count_saves(options, length) == Saves(loras, states)


def test_time_and_memory_come_from_own_runs_only(training: Training) -> None:
    """Unknown at first; a run of the same kind tells; another rank or other items do not."""
    training.set(max_train_steps=50)
    first = training.state()["summary"]
    assert (first["seconds"], first["memory_bytes"]) == (None, None)
    run = training.services.store.get(training.start())
    step = {"total": 50, "loss": 0.1, "seconds_per_step": 0.5, "memory_bytes": 2_000_000}
    write_journal(run, *[("step", number * 0.5, {"step": number, **step}) for number in range(1, 6)])
    end_run(run)
    found = training.state()["summary"]
    assert (found["seconds"], found["memory_bytes"]) == (25.0, 2_000_000)
    training.set(network_dim=4)
    assert training.state()["summary"]["seconds"] is None
    training.set(network_dim=None)
    training.studio.write_config(resolution=[128, 128])
    training.set(cache_missing=True)
    assert training.state()["summary"]["seconds"] is None


def test_a_stock_is_ready_only_when_nothing_is_missing() -> None:
    assert not Stock().ready
    assert Stock(items=2, missing={"latents": 0, "texts": 0}).ready
    assert not Stock(items=2, missing={"latents": 1, "texts": 0}).ready


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_start_makes_a_run_that_the_engine_reads(training: Training) -> None:
    """options.toml is whole; prompts are a file of the run; a second one waits behind it, a third goes before that."""
    training.set(output_name="cat", network_dim=8, prompts="a cat --d 5\n", sample_every_n_steps=10)
    run = training.services.store.get(training.start())
    options = from_mapping(TrainOptions, load_toml(run.folder / "options.toml"))
    assert check_train(options, run.folder) == []
    assert options.dataset_config == os.fspath(training.studio.config)
    assert options.output_dir is None
    assert Path(options.sample_prompts or "").read_text() == "a cat --d 5\n"
    assert Path(options.sample_prompts or "").is_relative_to(run.folder)
    assert (run.kind, run.title) == ("train", "cat")
    second, third = training.start(queue=True), training.start()
    assert training.services.queue.pending() == [third, run.id, second]


def test_the_command_is_read_back(training: Training) -> None:
    """What is copied parses to the same options, but for what belongs to the page's own run."""
    training.set(
        network_dim=8, optimizer_args=["betas=(0.9, 0.95)"], training_comment='it\'s "mine"', nabla_add_sta=False
    )
    state = training.state()
    words = shlex.split(state["command"])
    assert words[:3] == ["python", "-m", "backend.kandinsky5_train_network"]
    parsed = parse_command_line(TrainOptions, words[3:], "x", "").options
    run = training.options(training.start())
    assert parsed.model_dump(exclude_none=True) == run | {"output_dir": "output"}


def test_a_finished_run_is_cloned(training: Training) -> None:
    """Values, prompts and dataset come back; weights of the settings do not become values."""
    training.set(output_name="cat", network_dim=8, prompts="a cat\n", sample_every_n_steps=10, resume=None)
    before = training.state()
    run = training.start()
    training.done("reset_train")
    training.set(prompts=None)
    training.done("clone_train", run)
    after = training.state()
    for key in ("values", "prompts", "problems"):
        assert after[key] == before[key], key
    assert after["dataset"]["id"] == before["dataset"]["id"]
    assert "error" in training.ask("clone_train", "nothing")


def test_going_on_shows_what_changed(training: Training) -> None:
    """The newest whole state of a run; safe, meaning and impossible; only the last keeps it from starting."""
    training.set(output_name="cat", network_dim=8, save_state=True)
    run = training.services.store.get(training.start())
    assert "no whole state" in training.ask("resume_train", run.id)["error"]
    options = from_mapping(TrainOptions, load_toml(run.folder / "options.toml"))
    folder = run.folder / "checkpoints"
    write_state(folder / "cat-000002-state", options, 200, 2)
    newest = write_state(folder / "cat-000004-state", options, 400, 4)
    (folder / "cat-000006-state").mkdir()
    training.done("resume_train", run.id)
    state = training.state()
    assert state["values"]["resume"] == os.fspath(newest)
    assert (state["resume"]["step"], state["resume"]["epoch"], state["resume"]["run"]) == (400, 5, run.id)
    assert (state["resume"]["rows"], training.problems()) == ([], {})
    training.set(learning_rate=5e-5, save_every_n_steps=10)
    rows = {row["name"]: row["kind"] for row in training.state()["resume"]["rows"]}
    assert rows == {"learning_rate": "meaning", "save_every_n_steps": "safe"}
    assert training.options(training.start())["resume"] == os.fspath(newest)
    training.set(network_dim=4)
    assert "network_dim" in training.problems()["resume"]
    assert "problems" in training.ask("start_train", {"queue": True})


def test_a_state_folder_is_named_itself(training: Training, tmp_path: Path) -> None:
    state = write_state(tmp_path / "old" / "x-state", TrainOptions(task="k5-demo-t2v"))
    training.done("resume_train", os.fspath(state))
    assert training.state()["resume"]["name"] == "x-state"
    (state / "position.json").write_text("{}")
    training.set(network_dim=31)
    assert "damaged" in training.problems()["resume"]
    assert "problems" in training.ask("resume_train", os.fspath(tmp_path / "nothing"))


def test_an_import_fills_the_form(training: Training, tmp_path: Path) -> None:
    """The dataset of the command is opened; what is not here is said."""
    config = tmp_path / "other.toml"
    config.write_text(training.studio.config.read_text())
    command = f"--task k5-demo-t2v --dataset_config {config} --network_dim 4 --frob 1"
    notes = training.done("import_train", command)["notes"]
    assert [(note["name"], note["kind"]) for note in notes] == [("frob", "unknown")]
    state = training.state()
    assert state["dataset"]["name"] == "other"
    assert state["values"] == {"task": "k5-demo-t2v", "network_dim": 4}
    notes = training.done("import_train", "--task k5-demo-t2v --dataset_config /not/here.toml")["notes"]
    assert "not here" in notes[0]["text"]
    assert "error" in training.ask("import_train", "nothing of that kind")


def test_prompts_of_a_resumed_run_are_no_difference(training: Training) -> None:
    """The page writes its lines into each run's folder: only other lines are another thing. Steps done take no time."""
    training.set(prompts="a cat\n", sample_every_n_steps=10, max_train_steps=50, save_state=True)
    run = training.services.store.get(training.start())
    step = {"total": 50, "loss": 0.1, "seconds_per_step": 0.5}
    write_journal(run, *[("step", number * 0.5, {"step": number, **step}) for number in range(1, 6)])
    end_run(run)
    options = from_mapping(TrainOptions, load_toml(run.folder / "options.toml"))
    write_state(run.folder / "checkpoints" / "k5_lora-step00000020-state", options, 20, 2)
    training.done("resume_train", run.id)
    state = training.state()
    assert state["resume"]["rows"] == []
    assert state["summary"]["seconds"] == 15.0
    training.set(max_train_steps=20)
    assert "nothing is left" in training.problems()["resume"]
    training.set(prompts="a dog\n")
    assert {row["name"] for row in training.state()["resume"]["rows"]} == {"max_train_steps", "sample_prompts"}
