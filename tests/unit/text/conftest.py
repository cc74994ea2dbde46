"""Tiny random text encoders with the demo's tokenizers, in the diffusers layout, and diffusers' own prompt encoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parents[3] / "backend" / "demo" / "weights"


def _randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights of a size that makes every part count; norms away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def full_qwen() -> Any:
    """A whole Qwen2.5-VL model with vision tower and output head."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 1152,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return _randomise(Qwen2_5_VLForConditionalGeneration(config), 1)


@pytest.fixture(scope="session")
def full_clip() -> Any:
    """A CLIP text model for the demo's CLIP tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=904,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=902,
        eos_token_id=903,
        pad_token_id=903,
    )
    return _randomise(CLIPTextModel(config), 2)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory, full_qwen: Any, full_clip: Any) -> Path:
    """A diffusers-layout folder with both encoders and their tokenizers."""
    root = tmp_path_factory.mktemp("encoders")
    full_qwen.save_pretrained(root / "text_encoder")
    full_clip.save_pretrained(root / "text_encoder_2")
    shutil.copytree(DEMO / "tokenizer", root / "tokenizer")
    shutil.copytree(DEMO / "tokenizer_2", root / "tokenizer_2")
    return root


class TextProcessor:
    """Qwen's processor for text only; the real one needs torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Any, images: Any = None, videos: Any = None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def decode(self, *arguments: Any, **options: Any) -> str:
        return self.tokenizer.decode(*arguments, **options)


@pytest.fixture(scope="session")
def pipeline(encoders: Path, full_qwen: Any, full_clip: Any) -> Any:
    """diffusers' text-to-video pipeline with these encoders and the official template and crop."""
    from diffusers import Kandinsky5T2VPipeline
    from transformers import AutoTokenizer

    from backend.text.templates import VIDEO

    pipe = Kandinsky5T2VPipeline(
        transformer=None,
        vae=None,
        text_encoder=full_qwen,
        tokenizer=TextProcessor(AutoTokenizer.from_pretrained(str(encoders / "tokenizer"))),
        text_encoder_2=full_clip,
        tokenizer_2=AutoTokenizer.from_pretrained(str(encoders / "tokenizer_2")),
        scheduler=None,
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = VIDEO.text, VIDEO.crop
    return pipe


@pytest.fixture
def copy_of(encoders: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the encoders' folder and change it: config keys of Qwen, names of its tensors (None drops one)."""

    def make(
        config: dict[str, Any] | None = None,
        rename: Callable[[str], str | None] | None = None,
        part: str = "text_encoder",
    ) -> Path:
        root = tmp_path / "copy"
        shutil.copytree(encoders, root)
        if config:
            path = root / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if rename:
            path = root / part / "model.safetensors"
            tensors = {rename(name): tensor.clone() for name, tensor in load_file(path).items()}
            save_file({name: tensor for name, tensor in tensors.items() if name is not None}, path)
        return root

    return make
