"""The look of the page, and our own scripts and styles as parts of it: nothing is fetched from outside."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from k5ui.text.loader import page_texts

STATIC = Path(__file__).resolve().parent / "static"
SCRIPTS = (
    "core.js",
    "header.js",
    "form.js",
    "vendor/uplot/uPlot.iife.min.js",
    "chart.js",
    "player.js",
    "stage.js",
    "runs.js",
    "training_live_chart.js",
    "training_live_samples.js",
    "training_live_compare.js",
    "training_live.js",
    "dataset.js",
    "dataset_dialogs.js",
    "dataset_settings.js",
    "dataset_grid.js",
    "dataset_items.js",
    "dataset_captions.js",
    "dataset_seen.js",
    "dataset_lint.js",
    "dataset_toml.js",
    "caching_ledger.js",
    "caching.js",
    "training_form_fields.js",
    "training_form_parts.js",
    "training.js",
)
STYLES = ("k5.css", "dataset.css", "caching.css", "training.css", "vendor/uplot/uPlot.min.css", "training_live.css")
_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace"]


def make_theme() -> gr.themes.Base:
    """Gradio's plain theme, bound to the variables of static/k5.css, so that there is one palette and no web font."""
    theme = gr.themes.Base(font=_SANS, font_mono=_MONO, text_size="sm", spacing_size="md", radius_size="md")
    values = {
        "body_background_fill": "var(--k5-bg)",
        "body_text_color": "var(--k5-text)",
        "body_text_color_subdued": "var(--k5-muted)",
        "background_fill_primary": "var(--k5-surface)",
        "background_fill_secondary": "var(--k5-sunk)",
        "block_background_fill": "transparent",
        "block_border_width": "0px",
        "block_padding": "0px",
        "block_label_border_width": "0px",
        "block_title_text_weight": "500",
        "input_border_width": "1px",
        "input_padding": "8px 12px",
        "input_shadow_focus": "none",
        "accordion_text_color": "var(--k5-text)",
        "block_border_color": "var(--k5-line)",
        "block_label_background_fill": "var(--k5-surface)",
        "block_label_text_color": "var(--k5-muted)",
        "block_title_text_color": "var(--k5-text)",
        "block_info_text_color": "var(--k5-muted)",
        "border_color_primary": "var(--k5-line)",
        "border_color_accent": "var(--k5-accent)",
        "color_accent": "var(--k5-accent)",
        "color_accent_soft": "var(--k5-tint)",
        "input_background_fill": "var(--k5-surface)",
        "input_background_fill_focus": "var(--k5-surface)",
        "input_border_color": "var(--k5-line)",
        "input_border_color_focus": "var(--k5-accent)",
        "input_placeholder_color": "var(--k5-muted)",
        "button_primary_background_fill": "var(--k5-accent)",
        "button_primary_background_fill_hover": "var(--k5-accent-hover)",
        "button_primary_text_color": "var(--k5-on-accent)",
        "button_secondary_background_fill": "var(--k5-surface)",
        "button_secondary_border_color": "var(--k5-line)",
        "button_secondary_text_color": "var(--k5-text)",
        "checkbox_background_color": "var(--k5-surface)",
        "checkbox_background_color_selected": "var(--k5-accent)",
        "checkbox_border_color": "var(--k5-line)",
        "checkbox_border_color_selected": "var(--k5-accent)",
        "checkbox_label_background_fill": "transparent",
        "slider_color": "var(--k5-accent)",
        "link_text_color": "var(--k5-link)",
        "panel_background_fill": "var(--k5-surface)",
        "shadow_drop": "none",
    }
    dark = {f"{name}_dark": value for name, value in values.items() if hasattr(theme, f"{name}_dark")}
    return theme.set(**values, **dark)


def make_css() -> str:
    """The styles of the page, its variables first."""
    return "\n".join((STATIC / name).read_text("utf-8") for name in STYLES)


def make_head(language: str, theme: str) -> str:
    """The scripts of the page with the texts of `language`; `theme` is set before the first paint."""
    start = {"language": language, "theme": theme, "texts": page_texts(language)}
    # "<" is written as an escape, so that no text can end the script element.
    data = json.dumps(start, ensure_ascii=False).replace("<", "\\u003c")
    scripts = "\n".join((STATIC / name).read_text("utf-8") for name in SCRIPTS)
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<script>window.K5 = {data};\n{scripts}</script>"
    )
