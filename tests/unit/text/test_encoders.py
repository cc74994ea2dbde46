"""Both encoders against diffusers' prompt encoding and transformers' whole models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import EngineError, UserError
from backend.text.encoders import CLIP_TOKENS, ClipEncoder, QwenEncoder
from backend.text.locate import CLIP, QWEN, locate_encoder
from backend.text.templates import IMAGE, VIDEO

CPU = torch.device("cpu")
WORDS = [
    "red", "circle", "moves", "slowly", "left", "кот", "бежит", "по", "снегу", "猫が走る", "🐈", "🎬",
    "naïve", "café", "the", "sea", "at", "night,", "4k;", "(close-up)", "don't", "zoom", "Straße",
    "{brace}", "100%", "<tag>", "ünïcödé", "ألعاب",
]  # fmt: skip


def qwen(root: Path, template=VIDEO, dtype: torch.dtype = torch.float32) -> QwenEncoder:
    return QwenEncoder(locate_encoder(root / "text_encoder", QWEN), template, device=CPU, dtype=dtype)


def clip(root: Path) -> ClipEncoder:
    return ClipEncoder(locate_encoder(root / "text_encoder_2", CLIP), device=CPU)


def random_prompts(count: int, seed: int, longest: int = 30) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def encode(encoder: QwenEncoder, prompts: list[str], max_length: int = 256, batch_size: int = 1) -> list[torch.Tensor]:
    return list(encoder.encode([encoder.tokenise(prompt, max_length) for prompt in prompts], batch_size))


def test_embeddings_equal_those_of_diffusers(encoders, pipeline) -> None:
    """26 prompts of many scripts, the empty one too; float32 on both sides, and the batch of diffusers at once."""
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

    prompts = ["", "a", "A red circle moves left.", "Рыжий кот бежит по снегу 🐈", *random_prompts(22, seed=3)]
    assert all(prompt_clean(prompt) == prompt for prompt in prompts)
    with torch.no_grad():
        expected, pooled, lengths = pipeline.encode_prompt(prompts, max_sequence_length=256, device=CPU)
    mine, clip_encoder = encode(qwen(encoders), prompts), clip(encoders)
    sizes = lengths.diff().tolist()
    for index, prompt in enumerate(prompts):
        assert mine[index].shape == (sizes[index], 64)
        torch.testing.assert_close(mine[index], expected[index, : sizes[index]], rtol=0, atol=1e-5)
        torch.testing.assert_close(clip_encoder.encode(prompt), pooled[index], rtol=0, atol=1e-5)


def test_bit_equal_to_the_whole_model(encoders, full_qwen) -> None:
    """The language model alone gives exactly the last hidden state of the model with vision tower and head."""
    encoder = qwen(encoders)
    tokens = encoder.tokenise("A red circle moves left.", 256)
    with torch.no_grad():
        outputs = full_qwen(input_ids=torch.tensor([tokens.ids]), output_hidden_states=True)
    [mine] = encoder.encode([tokens])
    assert torch.equal(mine, outputs.hidden_states[-1][0, VIDEO.crop :])


def test_prompts_are_not_cleaned(encoders) -> None:
    """Official behaviour; diffusers would turn all of these into the same text."""
    encoder = qwen(encoders)
    lengths = {len(encoder.tokenise(prompt, 256).ids) for prompt in ("a &amp; b", "a & b", "a &  b \n\n")}
    assert len(lengths) == 3


@pytest.mark.parametrize("template", [VIDEO, IMAGE])
def test_crop_is_that_of_the_tokenizer_and_the_published_one(encoders, template) -> None:
    encoder = qwen(encoders, template)
    assert encoder.crop == template.crop
    assert encoder.warnings == []
    assert encoder.tokenise("A cat.", 256).ids[: template.crop] == tuple(encoder.prefix_ids)


def test_other_crop_is_reported_and_the_real_one_used(copy_of) -> None:
    """A tokenizer without merges needs more tokens for the template; the prompt alone is still what is kept."""
    root = copy_of()
    path = root / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    encoder = qwen(root)
    assert encoder.crop > 500
    assert len(encoder.warnings) == 1
    assert str(encoder.crop) in encoder.warnings[0]
    assert "129" in encoder.warnings[0]
    [text] = encode(encoder, ["abc"])
    assert len(text) == 4


def test_left_padding_tokenizer_changes_nothing(encoders, copy_of) -> None:
    """kandinsky5.md section 3: padding on the left gives garbage, as no mask is used."""
    prompts = random_prompts(5, seed=4)
    root = copy_of()
    path = root / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    left = json.loads((root / "tokenizer_2" / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (root / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(left))
    for mine, expected in zip(encode(qwen(root), prompts, batch_size=5), encode(qwen(encoders), prompts), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
    assert torch.equal(clip(root).encode("a cat"), clip(encoders).encode("a cat"))


@pytest.mark.parametrize("seed", range(4))
def test_batches_equal_singles(encoders, seed) -> None:
    encoder, prompts = qwen(encoders), random_prompts(7, seed)
    singles = encode(encoder, prompts)
    for batch_size in (2, 3, 7):
        for mine, single in zip(encode(encoder, prompts, batch_size=batch_size), singles, strict=True):
            torch.testing.assert_close(mine, single, rtol=0, atol=1e-5)


def test_result_is_ready_for_training(encoders) -> None:
    """No gradient, no inference-mode tensor (autograd refuses those), and no view of the whole batch."""
    for text in encode(qwen(encoders), ["a cat", "a much longer prompt about a cat"], batch_size=2):
        assert not text.requires_grad
        assert not text.is_inference()
        assert text.untyped_storage().nbytes() == text.numel() * text.element_size()


@pytest.mark.parametrize("length", [2, 3, 16, 256])
def test_long_prompt_keeps_its_end_token(encoders, full_qwen, length) -> None:
    """Official code cuts the end token off, diffusers cuts characters; here the prompt's own tokens go."""
    encoder = qwen(encoders)
    prompt = "кот 🐈 runs " * 400
    tokens = encoder.tokenise(prompt, length)
    whole = encoder.tokenizer(VIDEO.wrap(prompt), verbose=False)["input_ids"]
    assert len(tokens.ids) == VIDEO.crop + length
    assert tokens.ids[:-1] == tuple(whole[: VIDEO.crop + length - 1])
    assert tokens.ids[-1] == encoder.suffix_ids[0] == whole[-1]
    assert (tokens.kept, tokens.removed) == (length - 1, len(whole) - VIDEO.crop - length)
    with torch.no_grad():
        official = full_qwen(input_ids=torch.tensor([whole[: VIDEO.crop + length]]), output_hidden_states=True)
    [mine] = encoder.encode([tokens])
    assert mine.shape == (length, 64)
    torch.testing.assert_close(mine[:-1], official.hidden_states[-1][0, VIDEO.crop : -1], rtol=0, atol=1e-5)


def test_prompt_of_exactly_the_limit_is_not_cut(encoders) -> None:
    encoder = qwen(encoders)
    size = len(encoder.tokenise("a cat runs", 256).ids) - VIDEO.crop
    assert encoder.tokenise("a cat runs", size).removed == 0
    assert encoder.tokenise("a cat runs", size - 1).removed == 1


@pytest.mark.parametrize(
    "prompt", ["\n\na cat", " \n a cat", "\t", "<|im_end|>", "<|image_pad|> a cat", "\x00", "a" * 20_000]
)
def test_odd_prompts_encode(encoders, prompt) -> None:
    [text] = encode(qwen(encoders), [prompt])
    assert torch.isfinite(text).all()
    assert 1 <= len(text) <= 256


def test_tokenizer_that_breaks_the_template_is_refused(encoders, monkeypatch) -> None:
    """The first tokens must be the template's; with padding or a start token before them the crop would be wrong."""
    encoder = qwen(encoders)
    original = encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda text: [0, *original(text)])
    with pytest.raises(EngineError, match="template") as caught:
        encoder.tokenise("a cat", 256)
    assert caught.value.phase == "text"


def test_bfloat16_is_close_to_float32(encoders) -> None:
    [rough] = encode(qwen(encoders, dtype=torch.bfloat16), ["a red cat runs"])
    [exact] = encode(qwen(encoders), ["a red cat runs"])
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_clip_cuts_at_77_and_says_how_much(encoders, full_clip) -> None:
    encoder = clip(encoders)
    prompt = "red circle " * 60
    ids = encoder.tokenizer(prompt, verbose=False)["input_ids"]
    assert encoder.removed(prompt) == len(ids) - CLIP_TOKENS > 0
    assert encoder.removed("red circle") == 0
    with torch.no_grad():
        cut = torch.tensor([ids[: CLIP_TOKENS - 1] + ids[-1:]])
        expected = full_clip(input_ids=cut, attention_mask=torch.ones_like(cut)).pooler_output[0]
    torch.testing.assert_close(encoder.encode(prompt), expected, rtol=0, atol=1e-5)


NAMINGS = {
    "published": lambda name: name.replace("model.language_model.", "model."),
    "new": lambda name: name if "language_model" in name else name.replace("model.", "model.language_model.", 1),
    "without head": lambda name: None if "lm_head" in name else name,
    "language model only": lambda name: (
        None
        if "visual" in name or "lm_head" in name
        else name.replace("model.language_model.", "").replace("model.", "")
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_of_every_layout_load(encoders, copy_of, naming) -> None:
    def rename(name: str) -> str | None:
        return name if name.startswith("visual.") and naming != "language model only" else NAMINGS[naming](name)

    [expected] = encode(qwen(encoders), ["a cat"])
    [mine] = encode(qwen(copy_of(rename=rename)), ["a cat"])
    assert torch.equal(mine, expected)


def test_flat_configuration_of_the_published_model_loads(encoders, copy_of) -> None:
    """Qwen's own config.json keeps the language model's numbers at the top and the old name for the positions."""
    root = copy_of()
    path = root / "text_encoder" / "config.json"
    content = json.loads(path.read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    text.pop("layer_types", None)
    flat = text | content | {"rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    path.write_text(json.dumps(flat))
    [expected] = encode(qwen(encoders), ["a cat"])
    [mine] = encode(qwen(root), ["a cat"])
    assert torch.equal(mine, expected)


def test_shards_load_and_a_missing_one_is_named(encoders, copy_of) -> None:
    root = copy_of()
    folder = root / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name].clone() for name in members}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    [expected] = encode(qwen(encoders), ["a cat"])
    [mine] = encode(qwen(root), ["a cat"])
    assert torch.equal(mine, expected)
    (folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its 2 weight files.*two\.safetensors"):
        qwen(root)


def test_whole_clip_model_loads(encoders, copy_of) -> None:
    """The published CLIP file has vision tower and projections, text names with a prefix, and a position table."""
    root = copy_of(part="text_encoder_2", rename=lambda name: f"text_model.{name.removeprefix('text_model.')}")
    folder = root / "text_encoder_2"
    extra = {"vision_model.x": torch.ones(2), "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2)}
    extra["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": text, "vision_config": {}}))
    assert torch.equal(clip(root).encode("a cat"), clip(encoders).encode("a cat"))


@pytest.mark.parametrize(
    ("config", "rename", "message"),
    [
        (None, lambda name: None if name.endswith("l.norm.weight") else name, r"missing tensors: norm.weight\."),
        (None, lambda name: "surprise" if name.endswith("lm_head.weight") else name, "unexpected tensors: surprise"),
        ({"text_config": {"model_type": "qwen2_5_vl_text", "num_hidden_layers": 10**9}}, None, "1000000000 layers"),
        ({"text_config": {"model_type": "qwen2_5_vl_text", "num_hidden_layers": 2}}, None, "wrong shapes"),
        ({"text_config": 5}, None, "does not describe"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(copy_of, config, rename, message) -> None:
    """Strict where others only log: nothing may stay at random values."""
    with pytest.raises(UserError, match=message) as caught:
        qwen(copy_of(config=config, rename=rename))
    assert caught.value.field == "text_encoder_qwen"
    assert caught.value.exit_code == 2


def test_damaged_and_foreign_number_formats(copy_of) -> None:
    root = copy_of()
    path = root / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match="number formats that are not supported"):
        qwen(root)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        qwen(root)


def test_tokenizer_problems(copy_of) -> None:
    root = copy_of()
    files = locate_encoder(root / "text_encoder_2", CLIP)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "tokenizer" / name).write_text((root / "tokenizer_2" / name).read_text())
    with pytest.raises(UserError, match="does not know"):
        qwen(root)
    (root / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        qwen(root)
    assert ClipEncoder(files, device=CPU).removed("a cat") == 0
    config = root / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 100}))
    with pytest.raises(UserError, match="wrong shapes"):
        clip(root)
