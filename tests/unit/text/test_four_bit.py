"""Qwen2.5-VL in four bits: every Linear, as bitsandbytes computes it by itself; and one encoder for two templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backend.errors import UserError
from backend.text import four_bit
from backend.text.encoders import ClipEncoder, QwenEncoder
from backend.text.locate import CLIP, QWEN, find_encoder, locate_encoder
from backend.text.templates import IMAGE, VIDEO

CPU = torch.device("cpu")


def load(root: Path, dtype: torch.dtype = torch.float32, quantised: bool = False, template=VIDEO) -> QwenEncoder:
    return QwenEncoder(locate_encoder(root, QWEN), template, device=CPU, dtype=dtype, quantised=quantised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_holds_the_codes_that_the_library_makes_of_it(encoders: Path, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain, small = load(encoders), load(encoders, dtype, quantised=True)
    linears = {name: layer for name, layer in plain.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(linears) == 2 * 7
    for name, layer in linears.items():
        found = small.model.get_submodule(name)
        assert type(found).__name__ == "Linear4bit"
        assert found.weight.dtype == torch.uint8
        assert found.weight.numel() == layer.weight.numel() // 2
        codes, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
        expected = dequantize_4bit(codes, state)
        assert torch.equal(dequantize_4bit(found.weight.data, found.weight.quant_state), expected)
        # Sixteen levels for each block of 64 weights: close, and not the same.
        error = (expected - layer.weight).norm() / layer.weight.norm()
        assert 0.02 < error < 0.15
    assert small.model.embed_tokens.weight.dtype == dtype
    tokens = small.tokenise("A red circle moves left.", 256)
    first, again = next(small.encode([tokens])), next(small.encode([tokens]))
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert torch.equal(first, next(load(encoders, dtype, quantised=True).encode([tokens])))


def test_without_the_library_nothing_is_loaded_and_the_way_out_is_told(encoders: Path, monkeypatch) -> None:
    find = four_bit.importlib.util.find_spec
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda name: None if "bits" in name else find(name))
    with pytest.raises(UserError, match="pip install bitsandbytes") as caught:
        load(encoders, quantised=True)
    assert caught.value.field == "quantized_qwen"
    load(encoders)


def test_one_encoder_serves_two_templates(encoders: Path) -> None:
    video = load(encoders)
    image = video.with_template(IMAGE)
    alone = load(encoders, template=IMAGE)
    assert image.model is video.model
    assert (video.crop, image.crop) == (129, 41)
    for prompt in ("A red circle.", "", "x " * 600):
        tokens = image.tokenise(prompt, 512)
        assert tokens == alone.tokenise(prompt, 512)
        assert torch.equal(next(image.encode([tokens])), next(alone.encode([tokens])))
    assert video.tokenise("a", 256).ids != image.tokenise("a", 256).ids


@pytest.mark.parametrize("limit", [3, 10, 77])
def test_clip_counts_and_reads_no_more_than_its_limit(encoders: Path, limit: int) -> None:
    files = locate_encoder(encoders, CLIP)
    encoder, whole = ClipEncoder(files, device=CPU, max_length=limit), ClipEncoder(files, device=CPU)
    short, long = "a", "a red circle moves left over a blue ground and then it turns around"
    count = len(encoder.tokenizer(long)["input_ids"])
    assert encoder.removed(long) == max(0, count - limit)
    assert encoder.removed(short) == 0
    assert (encoder.encode(short) - whole.encode(short)).abs().max() < 1e-5
    assert torch.equal(encoder.encode(long), whole.encode(long)) == (limit == 77)


def test_finding_an_encoder_asks_no_hub(encoders: Path, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def refuse(name: str, **options: object) -> str:
        asked.append(options)
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert find_encoder("someone/some-model", QWEN) is None
    assert asked == [{"local_files_only": True}]
    assert find_encoder(encoders, QWEN) == locate_encoder(encoders, QWEN)
    with pytest.raises(UserError, match="does not exist"):
        find_encoder(tmp_path / "nothing here", QWEN)
