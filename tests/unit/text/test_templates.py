"""The templates are the official ones, and their beginning has the published length."""

from __future__ import annotations

from typing import Any

import pytest

from backend.errors import UserError
from backend.text.templates import IMAGE, VIDEO, get_template


def _diffusers_template(name: str) -> tuple[str, int]:
    import diffusers

    pipeline: Any = getattr(diffusers, name)(
        transformer=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=None,
    )
    return pipeline.prompt_template, pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize(
    ("template", "pipeline"),
    [(VIDEO, "Kandinsky5T2VPipeline"), (VIDEO, "Kandinsky5I2VPipeline"), (IMAGE, "Kandinsky5T2IPipeline")],
)
def test_text_is_that_of_diffusers_but_for_the_one_corrected_word(template, pipeline) -> None:
    """diffusers has "prompt" for the official "promt", which is one token shorter, so its crop is one smaller."""
    text, start = _diffusers_template(pipeline)
    assert template.text.count("promt") == 1
    assert text in (template.text, template.text.replace("promt", "prompt"))
    assert start == template.crop - (1 if text != template.text else 0)


def test_official_typos_stay() -> None:
    assert "You are a promt engineer." in VIDEO.text
    assert "video game or scren content." in VIDEO.text
    assert VIDEO.text.endswith("<|im_start|>user\n{}<|im_end|>")
    assert IMAGE.text.endswith("<|im_start|>user\n{}<|im_end|>")


@pytest.mark.parametrize("template", [VIDEO, IMAGE])
def test_wrap_leaves_braces_alone(template) -> None:
    prompt = "a {red} {} {0} cat %s"
    assert template.wrap(prompt) == template.text.format(prompt)


def test_unknown_template() -> None:
    with pytest.raises(UserError, match="video, image"):
        get_template("audio")
