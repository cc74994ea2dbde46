"""The command that caches captions: names, tensors, metadata, the right template, each text once, only what is new."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.config.tasks import DEMO_WEIGHTS
from backend.data.cache_files import read_text_cache
from backend.text import encoders as encoders_module
from backend.text.templates import IMAGE, VIDEO
from tests.integration.caption_folder import (
    EMPTY,
    ENCODERS,
    add_sources,
    cache_text,
    make_config,
    make_dataset,
    read_all,
    read_cache,
    write_caption,
)
from tests.integration.diffusers_oracle import _TextOnlyProcessor
from tests.unit.data.dataset_folder import foreign_text

CPU = torch.device("cpu")
LONG = "a red circle moves left over a blue ground, " * 80
# Unequal lengths, a line break, braces, letters beyond ASCII.
CAPTIONS = {
    "a": "A red circle moves left.",
    "b": "кот 🐈 прыгает через забор, пока идёт дождь и светит солнце",
    "c": "{} {0} braces\nand a second line",
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """diffusers' text-to-video pipeline with the demo's encoders and the official template."""
    from diffusers import Kandinsky5T2VPipeline
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, Qwen2_5_VLForConditionalGeneration

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Kandinsky5T2VPipeline(
            transformer=None,
            vae=None,
            text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(
                DEMO_WEIGHTS / "text_encoder", dtype=torch.float32
            ),
            tokenizer=_TextOnlyProcessor(AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer")),
            text_encoder_2=CLIPTextModel.from_pretrained(DEMO_WEIGHTS / "text_encoder_2", dtype=torch.float32),
            tokenizer_2=CLIPTokenizer.from_pretrained(DEMO_WEIGHTS / "tokenizer_2"),
            scheduler=None,
        )
    found.prompt_template, found.prompt_template_encode_start_idx = VIDEO.text, VIDEO.crop
    return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is loaded, and which token ids and texts are encoded."""
    seen: dict[str, list[Any]] = {"loaded": [], "qwen": [], "clip": []}
    for name, key, method in (("QwenEncoder", "qwen", "encode"), ("ClipEncoder", "clip", "encode")):
        cls = getattr(encoders_module, name)
        start, encode = cls.__init__, getattr(cls, method)

        def load(self: Any, *arguments: Any, _start: Any = start, _name: str = name, **options: Any) -> None:
            seen["loaded"].append(_name)
            _start(self, *arguments, **options)

        def count(self: Any, *arguments: Any, _encode: Any = encode, _key: str = key, **options: Any) -> Any:
            seen[_key].append(arguments[0])
            return _encode(self, *arguments, **options)

        monkeypatch.setattr(cls, "__init__", load)
        monkeypatch.setattr(cls, method, count)
    return seen


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The caches of a video dataset of `CAPTIONS`, made once for the tests that change something about it."""
    root = tmp_path_factory.mktemp("cached")
    assert cache_text(make_dataset(root, CAPTIONS)).code == 0
    return read_all(root / "cache-0")


def put_caches(folder: Path, caches: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in caches.items():
        (folder / name).write_bytes(content)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-5 * expected.norm())


def test_names_tensors_and_metadata_are_those_that_other_tools_read(tmp_path: Path) -> None:
    config = make_dataset(tmp_path, {"clip_one": CAPTIONS["a"]}, {"still": CAPTIONS["b"]})
    run = cache_text(config, "--batch_size", "4")
    assert (run.code, run.of("finished")[0]["outputs"]) == (0, [str(tmp_path / "cache-0"), str(tmp_path / "cache-1")])
    assert set(read_all(tmp_path / "cache-0")) == {"clip_one_k5_te.safetensors", EMPTY["video"]}
    assert set(read_all(tmp_path / "cache-1")) == {"still_k5_te.safetensors", EMPTY["image"]}
    tensors, metadata = read_cache(tmp_path / "cache-0" / "clip_one_k5_te.safetensors")
    assert set(tensors) == {"text_embeds_float32", "pooled_embed_float32", "attention_mask"}
    tokens = tensors["text_embeds_float32"].shape[0]
    assert tensors["text_embeds_float32"].shape == (tokens, 128)
    assert tensors["pooled_embed_float32"].shape == (64,)
    assert tensors["attention_mask"].dtype == torch.bool
    assert tensors["attention_mask"].tolist() == [True] * tokens
    assert {key: metadata[key] for key in ("architecture", "format_version", "caption1")} == {
        "architecture": "kandinsky5", "format_version": "1.0.1", "caption1": CAPTIONS["a"],
    }  # fmt: skip
    assert (metadata["template"], metadata["max_length"], metadata["text_dtype"]) == ("video", "256", "float32")
    _, metadata = read_cache(tmp_path / "cache-1" / "still_k5_te.safetensors")
    assert (metadata["template"], metadata["max_length"], metadata["clip_max_length"]) == ("image", "512", "77")


def test_texts_of_videos_equal_those_of_diffusers(tmp_path: Path, pipeline: Any) -> None:
    """Traps T1 and T4: the video template, and captions of unequal lengths in one batch of the command."""
    config = make_dataset(tmp_path, CAPTIONS)
    assert cache_text(config, "--batch_size", "4").code == 0
    lengths = set()
    with torch.no_grad():
        for stem, caption in {**CAPTIONS, "": ""}.items():
            name = f"{stem}_k5_te.safetensors" if stem else EMPTY["video"]
            tensors, _ = read_cache(tmp_path / "cache-0" / name)
            text, lengths_of_one = pipeline._encode_prompt_qwen([caption], CPU, 256)
            assert lengths_of_one.tolist() == [0, text.shape[1]]
            assert close(tensors["text_embeds_float32"], text[0])
            assert close(tensors["pooled_embed_float32"], pipeline._encode_prompt_clip([caption], CPU)[0])
            lengths.add(text.shape[1])
        # Padding on the right changes nothing: diffusers' whole batch, cut to the true lengths, is the same again.
        batch, ends = pipeline._encode_prompt_qwen(list(CAPTIONS.values()), CPU, 256)
    for row, stem, start, end in zip(batch, CAPTIONS, ends[:-1], ends[1:], strict=True):
        tensors, _ = read_cache(tmp_path / "cache-0" / f"{stem}_k5_te.safetensors")
        assert close(tensors["text_embeds_float32"], row[: int(end - start)])
    assert len(lengths) == 4


def test_texts_of_images_equal_those_of_transformers(tmp_path: Path, pipeline: Any) -> None:
    """Trap T1, the other way round: images keep the image template and its crop of 41 tokens."""
    config = make_dataset(tmp_path, images=CAPTIONS)
    assert cache_text(config).code == 0
    for stem, caption in CAPTIONS.items():
        tensors, metadata = read_cache(tmp_path / "cache-0" / f"{stem}_k5_te.safetensors")
        ids = pipeline.tokenizer([IMAGE.text.replace("{}", caption)], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = pipeline.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        assert close(tensors["text_embeds_float32"], states[-1][0, 41:])
        assert metadata["template_crop"] == "41"


def test_videos_keep_256_tokens_and_images_512(tmp_path: Path) -> None:
    """Trap T2: a caption may not train with tokens that generation cuts off."""
    config = make_dataset(tmp_path, {"long": LONG}, {"long": LONG})
    run = cache_text(config)
    video = read_text_cache(tmp_path / "cache-0" / "long_k5_te.safetensors", "video")
    image = read_text_cache(tmp_path / "cache-1" / "long_k5_te.safetensors", "image")
    assert (video.text.shape[0], image.text.shape[0]) == (256, 512)
    messages = [record["message"] for record in run.of("warning")]
    assert len([message for message in messages if "only the first 255 fit into the video" in message]) == 1
    assert len([message for message in messages if "only the first 511 fit into the image" in message]) == 1
    assert any("CLIP reads only the first 77 tokens; 1 caption " in message for message in messages)
    assert cache_text(config, "--qwen_max_length", "20", "--skip_existing").code == 0
    for folder, kind in (("cache-0", "video"), ("cache-1", "image")):
        cache = read_text_cache(tmp_path / folder / "long_k5_te.safetensors", kind)
        assert (cache.text.shape[0], cache.metadata["max_length"]) == (20, "20")


def test_only_20_cut_captions_are_told_one_by_one(tmp_path: Path) -> None:
    run = cache_text(make_dataset(tmp_path, {f"{n:02}": f"{n} {LONG}" for n in range(23)}), "--qwen_max_length", "4")
    messages = [record["message"] for record in run.of("warning")]
    assert len([message for message in messages if "only the first 3 fit" in message]) == 20
    assert "23 captions in all have more tokens than fit into their template." in messages


def test_equal_captions_are_encoded_once(tmp_path: Path, counted: dict[str, list[Any]]) -> None:
    """Across sources and datasets of one kind; the two kinds have different templates but one CLIP vector."""
    same = {"a": "one text", "b": "one text", "c": "another"}
    for number, kind in enumerate(("video", "video", "image")):
        add_sources(tmp_path / str(number), kind, same)
    config = make_config(
        tmp_path, *({"kind": kind, "source": str(n)} for n, kind in enumerate(("video", "video", "image")))
    )
    assert cache_text(config).code == 0
    # The empty caption, "one text" and "another".
    assert (len(counted["qwen"]), len(counted["clip"])) == (3 + 3, 3)
    assert sorted(counted["loaded"]) == ["ClipEncoder", "QwenEncoder"]
    first, second, third = (read_all(tmp_path / f"cache-{number}") for number in range(3))
    assert first == second
    assert first["a_k5_te.safetensors"] == first["b_k5_te.safetensors"] != first["c_k5_te.safetensors"]
    assert [len(first), len(third)] == [4, 4]
    assert third["a_k5_te.safetensors"] != first["a_k5_te.safetensors"]


def test_valid_caches_are_left_alone_and_no_encoder_is_loaded(
    tmp_path: Path, counted: dict[str, list[Any]], cached: dict[str, bytes]
) -> None:
    config = make_dataset(tmp_path, CAPTIONS)
    put_caches(tmp_path / "cache-0", cached)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache-0").iterdir()}
    run = cache_text(config, "--skip_existing")
    assert (run.code, counted["loaded"]) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache-0").iterdir()} == before
    # Without the switch everything is made again, with the same bytes.
    assert cache_text(config).code == 0
    assert counted["loaded"] == ["ClipEncoder", "QwenEncoder"]
    assert read_all(tmp_path / "cache-0") == cached


@pytest.mark.parametrize("change", ["caption", "prefix", "max_length", "clip_max_length", "dtype", "encoder", "new"])
def test_exactly_what_changed_is_made_again(
    tmp_path: Path, change: str, counted: dict[str, list[Any]], cached: dict[str, bytes]
) -> None:
    config = make_dataset(tmp_path, CAPTIONS)
    put_caches(tmp_path / "cache-0", cached)
    words: tuple[str, ...] = ()
    encoders = ENCODERS
    expected = len(cached)
    if change == "caption":
        write_caption(tmp_path / "video" / "b.txt", "something else")
        expected = 1
    elif change == "new":
        add_sources(tmp_path / "video", "video", {"d": "the fourth"})
        expected = 1
    elif change == "prefix":
        config = make_dataset(tmp_path, CAPTIONS, caption_prefix="ohwx")
        expected -= 1  # the empty caption has no prefix
    elif change == "encoder":
        encoders = (*ENCODERS[:3], str(_other_clip(tmp_path)))
    else:
        words = {
            "max_length": ("--qwen_max_length", "40"),
            "clip_max_length": ("--clip_max_length", "8"),
            "dtype": ("--dtype", "bfloat16"),
        }[change]
    run = cache_text(config, "--skip_existing", *words, encoders=encoders)
    assert run.code == 0, run.stderr
    assert len(counted["qwen"]) == expected
    after = read_all(tmp_path / "cache-0")
    changed = {name for name in after if after[name] != cached.get(name)}
    assert len(changed) == expected
    assert cache_text(config, "--skip_existing", *words, encoders=encoders).code == 0
    assert len(counted["qwen"]) == expected, "nothing is left to do"
    if change == "prefix":
        _, metadata = read_cache(tmp_path / "cache-0" / "a_k5_te.safetensors")
        assert metadata["caption1"] == f"ohwx {CAPTIONS['a']}"


def _other_clip(folder: Path) -> Path:
    """CLIP with one number changed, and its tokenizer."""
    import shutil

    from safetensors.torch import load_file, save_file

    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.copytree(DEMO_WEIGHTS / part, folder / "other" / part)
    path = folder / "other" / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, path)
    return folder / "other" / "text_encoder_2"


def test_clip_reads_as_many_tokens_as_it_may(tmp_path: Path, pipeline: Any) -> None:
    config = make_dataset(tmp_path, CAPTIONS)
    assert cache_text(config, "--clip_max_length", "6").code == 0
    inputs = pipeline.tokenizer_2([CAPTIONS["b"]], max_length=6, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 6)
    with torch.no_grad():
        pooled = pipeline.text_encoder_2(**inputs).pooler_output[0]
        whole = pipeline._encode_prompt_clip([CAPTIONS["b"]], CPU)[0]
    tensors, metadata = read_cache(tmp_path / "cache-0" / "b_k5_te.safetensors")
    assert close(tensors["pooled_embed_float32"], pooled)
    assert not close(tensors["pooled_embed_float32"], whole)
    assert metadata["clip_max_length"] == "6"


def test_a_text_cache_of_another_tool_is_made_again_for_videos_only(tmp_path: Path) -> None:
    """Trap T1: other tools encode the captions of videos with the image template, which the file does not say."""
    config = make_dataset(tmp_path, {"a": "words"}, {"a": "words"})
    for folder in ("cache-0", "cache-1"):
        foreign_text(tmp_path / folder / "a_k5_te.safetensors", "words")
    foreign = (tmp_path / "cache-1" / "a_k5_te.safetensors").read_bytes()
    run = cache_text(config, "--skip_existing")
    assert any("template for images" in record["message"] for record in run.of("warning"))
    assert read_text_cache(tmp_path / "cache-0" / "a_k5_te.safetensors", "video").ours
    assert (tmp_path / "cache-1" / "a_k5_te.safetensors").read_bytes() == foreign


def test_quantised_caches_say_so_and_come_near(tmp_path: Path, cached: dict[str, bytes]) -> None:
    config = make_dataset(tmp_path, CAPTIONS)
    assert cache_text(config, "--quantized_qwen").code == 0
    put_caches(tmp_path / "plain", cached)
    for stem in CAPTIONS:
        tensors, metadata = read_cache(tmp_path / "cache-0" / f"{stem}_k5_te.safetensors")
        assert metadata["text_dtype"] == "nf4"
        plain, metadata = read_cache(tmp_path / "plain" / f"{stem}_k5_te.safetensors")
        assert metadata["text_dtype"] == "float32"
        difference = (tensors["text_embeds_float32"] - plain["text_embeds_float32"]).norm()
        assert 0.001 < difference / plain["text_embeds_float32"].norm() < 0.25
        assert torch.equal(tensors["pooled_embed_float32"], plain["pooled_embed_float32"])
    # Four bits are another recipe: nothing that was made without them is taken for valid.
    put_caches(tmp_path / "other" / "cache-0", cached)
    config = make_dataset(tmp_path / "other", CAPTIONS)
    report = cache_text(config, "--skip_existing", "--quantized_qwen", "--device", "cpu")
    assert any("text number format: was float32, now nf4 (4)" in record["message"] for record in report.of("phase"))
