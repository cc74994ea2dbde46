"""Options as form fields: made from their definition, read back by name, never by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from backend.config.options import OptionSpec
from k5ui.text.loader import Texts, Words

FIELD_ID = "k5-f-"


def image_field(**changes: Any) -> gr.Image:
    """An image field that hands over the path of the uploaded file as it is.

    Whether the file is an image is said by the check of the options, beside the field; Gradio's own reading would fail
    every event of the form instead. (A subclass would be taken for a custom component with a front end of its own.)
    """
    field = gr.Image(type="filepath", **changes)
    field.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
    return field


class Form:
    """The fields of one tab by option name.

    A field's value in the form is what the option takes, or None for 'as the task says'. Events get all fields as one
    mapping (`inputs` is a set, so Gradio delivers a dictionary) and answer with updates for some of them.
    """

    def __init__(self, options: Iterable[OptionSpec], words: Words) -> None:
        self.specs = {spec.name: spec for spec in options}
        self.words = words
        self.fields: dict[str, Component] = {}

    def add(self, name: str, component: Component) -> Component:
        """Register a field that was laid out by hand."""
        self.fields[name] = component
        return component

    def make(self, name: str, *, info: bool = False, **changes: Any) -> Component:
        """The field of an option: kind decides the widget, definition the label, unit and (`info`) help."""
        spec = self.specs[name]
        field = make_field(spec, self.words.now, **changes)
        if "label" not in changes:
            self.words.say(field, label=lambda texts: label_of(spec, texts))
        if info:
            self.words.say(field, info=lambda texts: help_text(spec, texts))
        if spec.kind == "choice" and "choices" not in changes:
            self.words.say(field, choices=lambda texts: choices_of(spec, texts))
        return self.add(name, field)

    @property
    def inputs(self) -> set[Component]:
        """All fields, for `inputs=` of an event."""
        return set(self.fields.values())

    def read(self, data: Mapping[Component, Any]) -> dict[str, Any]:
        """The values by option name from what an event delivers."""
        return {name: clean_value(self.specs.get(name), data.get(field)) for name, field in self.fields.items()}

    def write(self, values: Mapping[str, Any]) -> dict[Component, Any]:
        """Updates that show `values`; names that are no field are left out."""
        return {
            field: gr.update(value=shown_value(self.specs.get(name), values[name]))
            for name, field in self.fields.items()
            if name in values
        }

    def help(self) -> dict[str, str]:
        """Name -> sentence of help with the bounds, for the tooltips of fields that show none."""
        return {name: help_text(spec, self.words.now) for name, spec in self.specs.items() if name in self.fields}


def help_text(spec: OptionSpec, texts: Texts) -> str:
    """The help of an option with its bounds."""
    text = texts.help(spec.name, spec.help)
    low = spec.minimum if spec.minimum is not None else spec.exclusive_minimum
    if low is None or spec.maximum is None or spec.maximum > 1_000_000:
        return text
    return f"{text} {_number(low)} … {_number(spec.maximum)}"


def label_of(spec: OptionSpec, texts: Texts) -> str:
    """The name of a field with its unit."""
    label = texts(f"field.{spec.name}")
    return f"{label}, {texts(f'unit.{spec.unit}')}" if spec.unit else label


def make_field(spec: OptionSpec, texts: Texts, **changes: Any) -> Component:
    """A Gradio component for an option. Bounds are not given to the widget: it would refuse a whole event, where the
    check of the options puts a sentence beside the field."""
    common: dict[str, Any] = {
        "label": label_of(spec, texts),
        "elem_id": FIELD_ID + spec.name,
        "value": shown_value(spec, spec.default),
    }
    if spec.kind == "bool":
        return gr.Checkbox(**common | changes)
    if spec.kind == "choice":
        common |= {"choices": choices_of(spec, texts), "filterable": False}
        return gr.Dropdown(**common | changes)
    if spec.kind in ("int", "float") and not spec.is_list:
        common |= {"precision": 0, "step": 1} if spec.kind == "int" else {"step": 0.1}
        return gr.Number(**common | changes)
    common |= {"max_lines": 1}
    return gr.Textbox(**common | changes)


def choices_of(spec: OptionSpec, texts: Texts) -> list[tuple[str, str]]:
    """The choices of an option as a list field shows them; an optional one can be left to its default."""
    choices = [(choice, choice) for choice in spec.choices]
    return [(texts("choice.default"), ""), *choices] if spec.optional else choices


def _number(value: float) -> str:
    return f"{value:g}"


def clean_value(spec: OptionSpec | None, value: Any) -> Any:
    """What a widget gives as the option takes it: empty text is None, a whole float an integer."""
    if isinstance(value, str) and not value.strip():
        return None
    if spec is not None and isinstance(value, int | float) and not isinstance(value, bool):
        if spec.kind == "float":
            return float(value)
        if spec.kind == "int" and float(value).is_integer():
            return int(value)
    return value


def shown_value(spec: OptionSpec | None, value: Any) -> Any:
    """What a widget shows for an option's value: text fields and lists of choices have no None."""
    if value is None and spec is not None and spec.kind in ("str", "choice") and spec.path is None:
        return ""
    return value
