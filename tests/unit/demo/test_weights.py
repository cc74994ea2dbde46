"""The embedded weights: small, complete, and readable by the classes of diffusers and transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from backend.config.tasks import DEMO_WEIGHTS
from backend.text.templates import IMAGE, VIDEO

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def config(part: str) -> dict:
    return json.loads((DEMO_WEIGHTS / part / "config.json").read_text())


def test_all_files_together_are_below_25_mb():
    assert sum(path.stat().st_size for path in files(DEMO_WEIGHTS)) < 25_000_000


def test_only_safetensors_and_json():
    assert {path.suffix for path in files(DEMO_WEIGHTS)} == {".safetensors", ".json"}
    assert sorted(path.name for path in DEMO_WEIGHTS.iterdir()) == sorted(PARTS)


def test_no_file_names_the_machine_that_made_it():
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert "_name_or_path" not in config(part)


def test_every_weight_is_half_precision_and_finite():
    paths = [path for path in files(DEMO_WEIGHTS) if path.suffix == ".safetensors"]
    assert len(paths) == 4
    for path in paths:
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no dict
                tensor = handle.get_tensor(name)
                assert tensor.dtype == torch.float16, (path, name)
                assert bool(torch.isfinite(tensor).all()), (path, name)


def test_transformer_and_vae_load_strictly_in_diffusers():
    from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel

    for part, kind in (("transformer", Kandinsky5Transformer3DModel), ("vae", AutoencoderKLHunyuanVideo)):
        state = load_file(DEMO_WEIGHTS / part / "diffusion_pytorch_model.safetensors")
        model = kind.from_config(config(part))
        missing, unexpected = model.load_state_dict(state, strict=True)
        assert not missing
        assert not unexpected


def test_transformer_is_of_the_family():
    sizes = config("transformer")
    assert sizes["visual_cond"] is True
    assert (sizes["in_visual_dim"], sizes["out_visual_dim"], sizes["patch_size"]) == (16, 16, [1, 2, 2])
    assert (sizes["in_text_dim"], sizes["in_text_dim2"]) == (128, 64)
    assert config("text_encoder")["text_config"]["hidden_size"] == 128
    assert config("text_encoder_2")["hidden_size"] == 64


@pytest.mark.parametrize("template", [VIDEO, IMAGE], ids=lambda template: template.name)
def test_templates_have_their_published_lengths(template):
    """Trap: a tokenizer that reads the template in another number of tokens makes the crop cut inside it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer")
    prefix = tokenizer(template.prefix)["input_ids"]
    assert len(prefix) == template.crop
    assert tokenizer(template.wrap("a red star"))["input_ids"][: template.crop] == prefix
    assert tokenizer.padding_side == "right"


def test_every_word_of_the_grammar_is_one_token():
    from transformers import AutoTokenizer

    from backend.demo.clips import BACKGROUNDS, COLORS, NEW_SHAPES, SHAPES, SIZES

    tokenizer = AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer")
    for word in (*COLORS, *BACKGROUNDS, *SHAPES, *NEW_SHAPES, *SIZES):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
