"""What the Generate form means, without Gradio: values of a task, sizes, lengths, summary, settings of a clip."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from backend.config.generate import GenerateOptions
from backend.config.options import OptionSpec, specs
from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT, TASKS, TaskPreset, latent_frames, valid_frames
from backend.errors import Problem
from k5ui.services import Services
from k5ui.settings import WEIGHT_PARTS
from k5ui.text.loader import Texts

FIRST_TASK = "k5-demo-t2v"
SPECS: dict[str, OptionSpec] = {spec.name: spec for spec in specs(GenerateOptions)}
#: The app says where a clip is written and where text embeddings are kept.
LEFT_OUT = frozenset({"output", "text_cache_dir"})
#: Shown by one list of rows instead of two fields.
LORA_FIELDS = ("lora_weight", "lora_multiplier")
LORAS = "loras"
TASK_FIELDS = ("width", "height", "frames", "steps", "guidance", "scheduler_scale")
IMAGE_FIELDS = ("image", "image_last")
MAX_LORAS = 8
MAX_OFFERED = 300
#: (width, height) that the models were trained for, by the longer side of the task.
TRAINED_SIZES = {
    768: ((768, 512), (512, 768), (512, 512)),
    1280: ((1280, 768), (768, 1280), (1024, 1024), (1152, 896), (896, 1152), (1408, 640), (640, 1408)),
}
#: Sentences of the demo model's own small grammar; it knows no other words.
DEMO_EXAMPLES = (
    "a red circle moves left on a black background",
    "a big yellow star grows on a navy background",
    "a small cyan triangle moves up on a gray background",
    "a blue square moves right on a beige background",
)


def task_of(values: Mapping[str, Any]) -> TaskPreset:
    """The preset of a form's task; the demo if the value is none."""
    task = values.get("task")
    return TASKS.get(task, TASKS[FIRST_TASK]) if isinstance(task, str) else TASKS[FIRST_TASK]


def task_values(task: TaskPreset) -> dict[str, Any]:
    """The numbers that belong to a task. From an image the size follows the image, so width and height stay open."""
    values = {name: getattr(task, name) for name in TASK_FIELDS}
    if task.mode == "i2v" and not task.fixed_size:
        values |= {"width": None, "height": None}
    return values


def first_values() -> dict[str, Any]:
    """The form of a first visit: the demo model and a prompt that it knows; every clip draws its own seed."""
    values = {name: spec.default for name, spec in SPECS.items() if name not in LEFT_OUT and name not in LORA_FIELDS}
    task = TASKS[FIRST_TASK]
    return values | task_values(task) | {"task": FIRST_TASK, "prompt": DEMO_EXAMPLES[0], "seed": -1, LORAS: []}


def restored(draft: Mapping[str, Any]) -> dict[str, Any]:
    """The form from a draft: known fields of the draft over the first values, without images that are gone."""
    values = first_values()
    values |= {name: value for name, value in draft.items() if name in values}
    if values["task"] not in TASKS:
        values["task"] = FIRST_TASK
    for name in IMAGE_FIELDS:
        if not (isinstance(values[name], str) and os.path.isfile(values[name])):
            values[name] = None
    return values


def lora_rows(value: Any) -> list[dict[str, Any]]:
    """The rows of the LoRA list as the page's script sends them, with everything else left out."""
    rows = []
    for row in (value if isinstance(value, list) else [])[:MAX_LORAS]:
        if isinstance(row, dict):
            strength = row.get("strength")
            number = isinstance(strength, int | float) and not isinstance(strength, bool)
            rows.append({"path": str(row.get("path") or ""), "strength": float(strength) if number else 1.0})  # type: ignore[arg-type]
    return rows


def request_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a form asks for; LoRA rows become the two lists of the options."""
    options = {name: value for name, value in values.items() if name in SPECS and value is not None}
    rows = [row for row in lora_rows(values.get(LORAS)) if row["path"].strip()]
    if rows:
        options |= {
            "lora_weight": [row["path"].strip() for row in rows],
            "lora_multiplier": [row["strength"] for row in rows],
        }
    return options


def form_values(services: Services, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The form that makes the same clip again, from `{"options": ..., "seed": ..., ...}` of a clip or a run.

    Weights that the settings give anyway stay empty, so that the form follows the settings.
    """
    options = settings.get("options", {})
    values = {name: options.get(name, value) for name, value in first_values().items() if name != "prompt"}
    values["prompt"] = options.get("prompt")
    if values["negative_prompt"] == DEFAULT_NEGATIVE_PROMPT:
        values["negative_prompt"] = None
    task = task_of(values)
    values["task"] = task.name
    for name, value in task_values(task).items():
        values[name] = options.get(name) if options.get(name) is not None else settings.get(name, value)
    if isinstance(settings.get("seed"), int):
        values["seed"] = settings["seed"]
    known = services.settings.weights_for(task.name)
    for name in WEIGHT_PARTS:
        if options.get(name) == getattr(known, name):
            values[name] = None
    paths, strengths = options.get("lora_weight") or [], options.get("lora_multiplier") or []
    strengths = [*strengths, *[1.0] * len(paths)]
    values[LORAS] = lora_rows([{"path": path, "strength": strengths[index]} for index, path in enumerate(paths)])
    return values


def image_task(task: TaskPreset) -> TaskPreset:
    """The task that makes a clip from an image with the same model, or with its nearest kin."""
    if task.mode == "i2v":
        return task
    for name in (task.name.replace("-t2v-", "-i2v-").replace("-t2v", "-i2v"), f"k5-{task.architecture}-i2v-5s-sd"):
        if name in TASKS:
            return TASKS[name]
    return TASKS["k5-demo-i2v"]


# --- what the page shows beside the fields ------------------------------------------------------------------------


def describe(services: Services, values: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """Everything that the start bar and the chips show of a form; plain data for static/form.js."""
    problems, facts = services.check_generate(request_values(values))
    task = task_of(values)
    newest = services.clips(1)
    return {
        "task": task.name,
        "problems": [problem_row(problem, texts) for problem in problems],
        "notices": [_notice(notice, texts) for notice in facts.get("notices", [])],
        "weights": _weights(task, problems, facts, texts),
        "summary": summary_line(facts, texts),
        "sizes": sizes(task, texts),
        "lengths": lengths(task, texts),
        "means": means(values, texts),
        "examples": examples(task, texts),
        "lora_files": services.lora_files()[:MAX_OFFERED],
        "width": values.get("width"),
        "height": values.get("height"),
        "frames": values.get("frames"),
        "seed": values.get("seed"),
        "last_seed": newest[0].get("seed") if newest else None,
    }


def problem_row(problem: Problem, texts: Texts) -> dict[str, Any]:
    """A problem with the name of its field in the page's language."""
    label = texts(f"field.{problem.field}") if problem.field in SPECS else problem.field
    return {"field": problem.field, "label": label, "message": problem.message}


def _notice(notice: str, texts: Texts) -> str:
    """A notice with the field's name on the page in the place of its flag."""
    match = re.match(r"--(\w+): (.*)", notice, re.DOTALL)
    if match and match[1] in SPECS:
        return f"{texts('field.' + match[1])}: {match[2]}"
    return notice


def _weights(task: TaskPreset, problems: Sequence[Problem], facts: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    wrong = [problem.field for problem in problems if problem.field in WEIGHT_PARTS]
    if wrong:
        parts = ", ".join(dict.fromkeys(texts(f"field.{name}") for name in wrong))
        return {"ok": False, "line": texts("generate.weights_missing", parts=parts)}
    summary = (facts.get("weights") or {}).get("dit") or ""
    key = "generate.weights_demo" if task.is_demo else "generate.weights_ok"
    return {"ok": True, "line": texts(key, summary=summary).strip()}


def sizes(task: TaskPreset, texts: Texts) -> list[dict[str, Any]]:
    """Sizes to choose from: the task's own first, then the others that the models were trained for."""
    own = (task.width, task.height)
    found = [{"width": own[0], "height": own[1], "note": texts("generate.size_task")}]
    if task.fixed_size:
        return found
    if task.mode == "i2v":
        note = texts("generate.size_image_note")
        found.insert(0, {"width": None, "height": None, "label": texts("generate.size_image"), "note": note})
    others = (size for size in TRAINED_SIZES.get(max(own), ()) if size != own)
    return found + [{"width": w, "height": h, "note": texts("generate.size_other")} for w, h in others]


def lengths(task: TaskPreset, texts: Texts) -> list[dict[str, Any]]:
    """Lengths to choose from, up to the task's own."""
    if task.fixed_size:
        return [{"frames": task.frames, "label": texts("generate.length_frames", n=task.frames)}]
    found = [{"frames": 1, "label": texts("generate.length_image")}] if task.mode == "t2v" else []
    for seconds in (2, 5, 10):
        if seconds * 24 + 1 <= task.frames:
            found.append({"frames": seconds * 24 + 1, "label": texts("generate.length_seconds", n=seconds)})
    return found


def means(values: Mapping[str, Any], texts: Texts) -> str:
    """What the number of frames means."""
    frames, fps = values.get("frames"), values.get("fps")
    if not isinstance(frames, int) or not isinstance(fps, int) or frames < 1 or fps < 1:
        return ""
    whole = valid_frames(frames)
    if whole == 1:
        return texts("generate.means_image")
    seconds = f"{whole / fps:.1f}"
    text = texts("generate.means", frames=whole, seconds=seconds, fps=fps, latent=latent_frames(whole))
    if whole != frames:
        text = f"{texts('generate.means_rounded', frames=frames, nearest=whole)}; {text}"
    return text


def examples(task: TaskPreset, texts: Texts) -> list[dict[str, str]]:
    """Prompts to start from, each with a short name."""
    if task.is_demo:
        return [{"label": texts(f"example.demo.{n}"), "prompt": prompt} for n, prompt in enumerate(DEMO_EXAMPLES, 1)]
    return [{"label": texts(f"example.{n}.label"), "prompt": texts(f"example.{n}")} for n in (1, 2, 3)]


def summary_line(facts: Mapping[str, Any], texts: Texts) -> str:
    """What the clip needs and how long the same took before, from the engine's own figures; only what is known."""
    parts = []
    if facts.get("clips") and facts["clips"] > 1:
        parts.append(texts("summary.clips", n=facts["clips"]))
    if facts.get("width"):
        parts.append(texts("summary.clip", width=facts["width"], height=facts["height"], frames=facts["frames"]))
    if facts.get("passes"):
        parts.append(texts("summary.passes", n=facts["passes"]))
    if facts.get("memory_bytes"):
        parts.append(texts("summary.memory", size=size_text(facts["memory_bytes"], texts)))
    if facts.get("disk_bytes"):
        parts.append(texts("summary.disk", size=size_text(facts["disk_bytes"], texts)))
    if facts.get("expected_seconds"):
        low, high = facts["expected_seconds"]
        time = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}–{high:.0f}"
        parts.append(texts("summary.before", time=time))
    return " · ".join(parts)


def size_text(size: float, texts: Texts) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("gb", 1e9), ("mb", 1e6)):
        if size >= factor:
            return texts(f"size.{unit}", n=f"{size / factor:.1f}" if size < 10 * factor else f"{size / factor:.0f}")
    return texts("size.kb", n=max(1, round(size / 1e3)))


def default_negative() -> str:
    """The negative prompt that the models use when none is given."""
    return DEFAULT_NEGATIVE_PROMPT
