"""What the Generate form means: tasks, drafts, LoRA rows, requests, settings of a clip, summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend.config.generate import GenerateOptions
from backend.config.options import from_mapping
from backend.config.tasks import TASKS
from k5ui import generate_form as rules
from k5ui.form import clean_value, help_text, shown_value
from k5ui.services import Services
from k5ui.text.loader import Texts

ENGLISH = Texts("en")


@pytest.fixture
def services(workspace: Path) -> Services:
    """Services of an empty workspace."""
    return Services(workspace)


def test_first_form_has_no_problem(services: Services) -> None:
    """A first visitor can press Generate at once."""
    problems, facts = services.check_generate(rules.request_values(rules.first_values()))
    assert problems == []
    assert facts["frames"] == 17


@pytest.mark.parametrize("name", sorted(TASKS))
def test_values_of_every_task_make_valid_options(name: str) -> None:
    """What choosing a task puts into the form is what the task says; sizes and lengths that are offered fit it."""
    task = TASKS[name]
    values = rules.first_values() | rules.task_values(task) | {"task": name}
    from_mapping(GenerateOptions, rules.request_values(values))
    for size in rules.sizes(task, ENGLISH):
        for side in (size["width"], size["height"]):
            assert side is None or side % task.size_multiple == 0
    assert all(length["frames"] % 4 == 1 for length in rules.lengths(task, ENGLISH))
    assert max(length["frames"] for length in rules.lengths(task, ENGLISH)) == task.frames
    assert rules.image_task(task).mode == "i2v"
    assert rules.image_task(task).architecture == task.architecture


def test_drafts_of_any_kind_give_a_form(tmp_path: Path) -> None:
    """Unknown keys, unknown tasks and images that are gone do no harm."""
    image = tmp_path / "a.png"
    image.write_bytes(b"x")
    draft = {"task": "no-such", "image": str(image), "image_last": str(tmp_path / "gone.png"), "evil": 1, "steps": 7}
    values = rules.restored(draft)
    assert values["task"] == rules.FIRST_TASK
    assert values["image"] == str(image)
    assert values["image_last"] is None
    assert values["steps"] == 7
    assert "evil" not in values


@pytest.mark.parametrize(
    ("sent", "rows"),
    [
        ("nonsense", []),
        ([1, "a", None], []),
        ([{"path": "/a.safetensors", "strength": 0.5}], [{"path": "/a.safetensors", "strength": 0.5}]),
        ([{"path": None, "strength": True}], [{"path": "", "strength": 1.0}]),
        ([{"path": str(n)} for n in range(20)], [{"path": str(n), "strength": 1.0} for n in range(8)]),
    ],
)
def test_lora_rows_take_nothing_on_trust(sent: Any, rows: list[dict[str, Any]]) -> None:
    """The list comes from a script in the browser."""
    assert rules.lora_rows(sent) == rows


def test_lora_rows_become_two_lists() -> None:
    """Rows without a file are left out."""
    values = rules.first_values() | {"loras": [{"path": " /a ", "strength": 0.5}, {"path": " ", "strength": 2.0}]}
    request = rules.request_values(values)
    assert request["lora_weight"] == ["/a"]
    assert request["lora_multiplier"] == [0.5]
    assert "loras" not in request


def test_settings_of_a_clip_fill_the_form(services: Services) -> None:
    """Weights that the settings give anyway stay open; the drawn seed and the real size are taken."""
    weights = vars(services.settings.weights_for("k5-demo-i2v"))
    options = {"task": "k5-demo-i2v", "prompt": "p", "steps": 9, "seed": -1, "lora_weight": ["/x"], **weights}
    settings = {"options": options, "seed": 77, "width": 64, "height": 64, "frames": 17}
    values = rules.form_values(services, settings)
    assert (values["task"], values["prompt"], values["steps"], values["seed"]) == ("k5-demo-i2v", "p", 9, 77)
    assert all(values[name] is None for name in weights)
    assert values["loras"] == [{"path": "/x", "strength": 1.0}]
    values = rules.form_values(services, {"options": options | {"dit": "/mine.safetensors"}})
    assert values["dit"] == "/mine.safetensors"


def test_means_says_what_a_length_is() -> None:
    """Frames, seconds, latent frames; lengths between 4n + 1 say what they become."""
    assert rules.means({"frames": 121, "fps": 24}, ENGLISH).startswith("121 frames = 5.0 s at 24")
    assert "31 latent frames" in rules.means({"frames": 121, "fps": 24}, ENGLISH)
    assert rules.means({"frames": 120, "fps": 24}, ENGLISH).startswith("lengths are 4n + 1: 120 becomes 117;")
    assert rules.means({"frames": 1, "fps": 24}, ENGLISH) == "one frame = an image"
    assert rules.means({"frames": None, "fps": 24}, ENGLISH) == ""


def test_summary_says_only_what_is_known() -> None:
    """Unknown facts leave no gap; sizes are readable."""
    assert rules.summary_line({}, ENGLISH) == ""
    facts = {
        "width": 768,
        "height": 512,
        "frames": 121,
        "memory_bytes": 38_600_000_000,
        "expected_seconds": [12.2, 14.9],
    }
    line = rules.summary_line(facts, ENGLISH)
    assert line == "768×512, 121 frames · at least 39 GB of memory · took 12–15 s before"


def test_values_of_widgets() -> None:
    """Empty text is no value, whole floats are integers where the option is one, text fields show no None."""
    specs = rules.SPECS
    assert clean_value(specs["steps"], 20.0) == 20
    assert type(clean_value(specs["guidance"], 5)) is float
    assert clean_value(specs["prompt"], "  ") is None
    assert clean_value(specs["fp8_base"], True) is True
    assert shown_value(specs["prompt"], None) == ""
    assert shown_value(specs["width"], None) is None
    assert "0 … 256" in help_text(specs["blocks_to_swap"], ENGLISH)
    assert "…" not in help_text(specs["seed"], ENGLISH)
