"""Build the demo's two tokenizers and two frozen text encoders.

The tokenizers have the pre-tokenisation of the real ones and learn the words of the templates and captions; the words
of the templates that the real vocabulary splits in two are split here too, so the templates have their real lengths and
the published crop numbers hold. The encoders are random but chosen so that a caption stays readable: see the functions.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT
from backend.demo.clips import BACKGROUNDS, CAPTION_STYLES, COLORS, MOTIONS, SHAPES, SIZES, ClipSpec, caption

_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words of the templates that Qwen2.5's own vocabulary splits in two.
_SPLIT_WORDS = {
    "scren": (" sc", "ren"),
    "postprocessing": (" post", "processing"),
    "promt": (" prom", "t"),
    "dynamism": (" dynam", "ism"),
}
# Words that people may try; each becomes one token.
_MORE_WORDS = """
a an the of in on at to and or with from into over under left right up down top bottom side center centre middle
corner small big large tiny huge fast slow slowly quickly moves moving move grows growing grow shrinks shrinking
shrink stays staying stay still static rotates rotating spins spinning bounces bouncing falls falling rises rising
jumps jumping appears disappears blinks fades circle square triangle star ring cross heart arrow diamond ball box
shape dot line hexagon oval moon cloud flower red green blue yellow purple orange cyan white black gray grey navy
pink beige brown lime teal gold silver magenta violet dark light bright background color video clip image picture
animation simple plain flat minimal style it is its that there one two three object scene person man woman cat dog
car house tree sky sun sea water fire night day city street forest camera zoom view
""".split()
_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _sample_captions() -> list[str]:
    specs = itertools.product(COLORS, SHAPES, MOTIONS, BACKGROUNDS, (None, *SIZES))
    captions = [caption(ClipSpec(*words), style) for words in specs for style in range(CAPTION_STYLES)]
    return captions[:: len(captions) // 800]


def _merges_of(tokenizer: Tokenizer) -> tuple[dict[str, int], Any]:
    """Vocabulary and the list of merged pairs (the tokenizer classes' annotations deny the list that they take)."""
    model = json.loads(tokenizer.to_str())["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], [(left, right) for left, right in pairs]


def _template_lines(templates: list[str]) -> list[str]:
    lines = []
    for template in templates:
        for marker in ("<|im_start|>", "<|im_end|>", "{}"):
            template = template.replace(marker, "")
        for word in _SPLIT_WORDS:
            template = template.replace(f" {word}", "")
        lines.append(template)
    return lines


def build_qwen_tokenizer(templates: list[str]) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2.5's pre-tokenisation and special tokens; `templates` are learned word by word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lines = _template_lines([*templates, DEFAULT_NEGATIVE_PROMPT]) * 50
    lines += _sample_captions()
    lines += [part for parts in _SPLIT_WORDS.values() for part in parts] * 50
    for word in (*_MORE_WORDS, *COLORS, *BACKGROUNDS, *SHAPES):
        lines += [f" {word}"] * 30 + [word] * 8 + [word.capitalize()] * 4
    lines += ["\n", ".\n", ":\n"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=4,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(lines, trainer)
    vocabulary, merges = _merges_of(tokenizer)
    first = len(vocabulary)
    return Qwen2Tokenizer(
        vocab={**vocabulary, **{token: first + index for index, token in enumerate(_SPECIALS)}},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=list(_SPECIALS[1:]),
        padding_side="right",
        model_max_length=32768,
    )


def build_clip_tokenizer() -> CLIPTokenizer:
    """Lower-case BPE with CLIP's pieces and order: bytes, bytes at word ends, merges, the two special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=3000, min_frequency=3, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator([*_sample_captions(), *[DEFAULT_NEGATIVE_PROMPT] * 20, *_MORE_WORDS * 10], trainer)
    _, merges = _merges_of(tokenizer)
    vocabulary: dict[str, int] = {}
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    for token in (*tokens, "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def build_qwen_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A 2-layer, 128-wide Qwen2.5-VL with large embeddings: its last hidden state keeps each word apart."""
    token: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIALS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 15) // 16 * 16,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.06,
            "bos_token_id": token["<|endoftext|>"],
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    model.tie_weights()
    return model


def build_clip_encoder(tokenizer: Any) -> CLIPTextModel:
    """A 2-layer, 64-wide CLIP text model whose pooled vector is a smooth bag of words.

    Near-uniform attention (tiny queries and keys), strong values and outputs, a tiny feed-forward part: with ordinary
    random weights one changed word gives an unrelated vector, which cannot generalise to unseen captions.
    """
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=64,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if "token_embedding" in name:
            deviation = 1.0
        elif any(part in name for part in ("position", "q_proj", "k_proj", "fc")):
            deviation = 0.02
        else:
            deviation = (1 if "v_proj" in name else 2.5) / 8
        torch.nn.init.normal_(weight, std=deviation)
    return model


def build_text_models(folder: Path, templates: list[str], seed: int = 1234) -> None:
    """Build and save tokenizer, tokenizer_2, text_encoder and text_encoder_2 (fp16) into `folder`."""
    torch.manual_seed(seed)
    tokenizer, clip_tokenizer = build_qwen_tokenizer(templates), build_clip_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    clip_tokenizer.save_pretrained(folder / "tokenizer_2")
    build_qwen_encoder(tokenizer).half().save_pretrained(folder / "text_encoder")
    build_clip_encoder(clip_tokenizer).half().save_pretrained(folder / "text_encoder_2")
