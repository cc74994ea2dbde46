"""Embedding prompts: each encoder once or never, the cache whole or ignored, mistakes named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.errors import EngineError, UserError
from backend.text import encoders as encoders_module
from backend.text.cache import CacheKey, cache_file, read_embeds
from backend.text.embed import PromptEmbeds, embed_prompts
from backend.text.locate import CLIP, QWEN, locate_encoder
from backend.text.templates import VIDEO

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).resolve().parents[3]
PROMPTS = ["A red circle moves left.", "кот 🐈", ""]


def embed(root: Path, prompts: list[str], cache: Path | None = None, **options: Any) -> list[PromptEmbeds]:
    return embed_prompts(prompts, **{"qwen": root, "clip": root, "device": CPU, "cache_dir": cache, **options})


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoders_module, "QwenEncoder", refuse)
    monkeypatch.setattr(encoders_module, "ClipEncoder", refuse)


def same(left: list[PromptEmbeds], right: list[PromptEmbeds]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(
        torch.equal(a.text, b.text) and torch.equal(a.pooled, b.pooled) and a.warnings == b.warnings for a, b in pairs
    )


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    loads: list[str] = []
    for name in ("QwenEncoder", "ClipEncoder"):
        original = getattr(encoders_module, name)

        def load(*arguments: Any, _name: str = name, _original: Any = original, **options: Any) -> Any:
            loads.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(encoders_module, name, load)
    return loads


def test_cached_prompts_load_no_encoder(encoders, tmp_path, monkeypatch) -> None:
    first = embed(encoders, PROMPTS, tmp_path)
    forbid_loading(monkeypatch)
    again = embed(encoders, [*reversed(PROMPTS), PROMPTS[0]], tmp_path)
    assert same(again, [*reversed(first), first[0]])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    with pytest.raises(AssertionError, match="was loaded"):
        embed(encoders, ["another prompt"], tmp_path)


def test_cached_prompts_do_not_even_import_transformers(encoders, tmp_path) -> None:
    embed(encoders, PROMPTS, tmp_path)
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom backend.text.embed import embed_prompts\n"
        "root, cache = map(Path, sys.argv[1:3])\n"
        "embeds = embed_prompts(sys.argv[3:], qwen=root, clip=root, device=torch.device('cpu'), cache_dir=cache)\n"
        "assert len(embeds) == 3 and embeds[2].text.shape == (1, 64)\n"
        "assert not {'transformers', 'diffusers', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(encoders), str(tmp_path), *PROMPTS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_each_encoder_is_loaded_once_and_equal_prompts_encoded_once(encoders, monkeypatch) -> None:
    """Trap B21: nothing is loaded again for every prompt."""
    loads, seen = count_loads(monkeypatch), []
    results = embed(
        encoders,
        ["a", "b", "a", "c", "a"],
        on_progress=lambda message, done, total: seen.append((message, done, total)),
    )
    assert sorted(loads) == ["ClipEncoder", "QwenEncoder"]
    assert results[0] is results[2] is results[4]
    assert [entry[1:] for entry in seen if "Qwen" in entry[0]] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_loading_and_encoding_are_quiet(encoders, capfd, caplog) -> None:
    embed(encoders, ["a very long prompt " * 200])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other prompt", "nan"])
def test_damaged_cache_file_is_written_again(encoders, tmp_path, damage) -> None:
    expected = embed(encoders, PROMPTS[:2], tmp_path)
    files = locate_encoder(encoders, QWEN), locate_encoder(encoders, CLIP)
    key = CacheKey(VIDEO, 256, (files[0].fingerprint, files[1].fingerprint), torch.float32)
    path, other = (cache_file(tmp_path, key.digest(prompt)) for prompt in PROMPTS[:2])
    good = path.read_bytes()
    damaged = {"cut": good[:-7], "empty": b"", "noise": os.urandom(300), "other prompt": other.read_bytes()}
    damaged["nan"] = good[:-4] + b"\xff\xff\xff\x7f"
    path.write_bytes(damaged[damage])
    assert read_embeds(tmp_path, key.digest(PROMPTS[0]), torch.float32) is None
    assert same(embed(encoders, PROMPTS[:2], tmp_path), expected)
    assert read_embeds(tmp_path, key.digest(PROMPTS[0]), torch.float32) is not None


def test_key_depends_on_all_that_matters(encoders, copy_of, tmp_path, monkeypatch) -> None:
    """Another template, limit, number format or encoder must not be answered with the first one's embeddings."""
    embed(encoders, PROMPTS[:1], tmp_path)
    changed = copy_of(part="text_encoder_2", config={"projection_dim": 3})
    loads = count_loads(monkeypatch)
    for root, options in (
        (encoders, {"template": "image"}),
        (encoders, {"max_length": 10}),
        (encoders, {"dtype": torch.bfloat16}),
        (encoders, {"clip": changed}),
    ):
        embed(root, PROMPTS[:1], tmp_path, **options)
        assert sorted(loads) == ["ClipEncoder", "QwenEncoder"]
        loads.clear()
    assert len(list(tmp_path.glob("*.safetensors"))) == 5


def test_a_stopped_run_keeps_what_it_has(encoders, tmp_path, monkeypatch) -> None:
    class StoppedError(Exception):
        pass

    def stop_at_two(message: str, done: int, total: int) -> None:
        if "Encoding prompts with Qwen" in message and done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        embed(encoders, PROMPTS, tmp_path, on_progress=stop_at_two)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    forbid_loading(monkeypatch)
    assert len(embed(encoders, PROMPTS[:2], tmp_path)) == 2


def test_bfloat16_result_and_cache(encoders, tmp_path) -> None:
    [first] = embed(encoders, PROMPTS[:1], tmp_path, dtype=torch.bfloat16)
    [again] = embed(encoders, PROMPTS[:1], tmp_path, dtype=torch.bfloat16)
    assert first.text.dtype == again.text.dtype == torch.bfloat16
    assert first.pooled.dtype == again.pooled.dtype == torch.float32
    assert same([first], [again])


def test_cut_prompts_are_reported_also_from_the_cache(encoders, tmp_path) -> None:
    prompt = "red circle " * 300
    for _ in range(2):
        said: list[str] = []
        [embeds] = embed(encoders, [prompt], tmp_path, on_warning=said.append)
        assert embeds.text.shape == (256, 64)
        assert len(said) == 2
        assert "only the first 255 fit" in said[1]
        assert "CLIP reads only 77" in said[0]
        assert tuple(said) == embeds.warnings


def test_image_template_has_its_own_limit(encoders) -> None:
    [embeds] = embed(encoders, ["red circle " * 600], template="image")
    assert embeds.text.shape == (512, 64)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_values_that_are_no_numbers_are_an_engine_error(copy_of, part) -> None:
    """musubi.md: NaN silently replaced by zero makes a prompt without meaning."""
    from safetensors.torch import load_file, save_file

    root = copy_of()
    path = root / part / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("norm.weight") and "layer" not in name.rsplit(".", 2)[-2][:5])
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path)
    with pytest.raises(EngineError, match="not numbers") as caught:
        embed(root, ["a cat"])
    assert caught.value.phase == "text"


def test_broken_character_is_a_mistake_of_the_prompt(encoders) -> None:
    with pytest.raises(UserError, match="position 3") as caught:
        embed(encoders, ["a \ud800"])
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("location", ["{root}", "{root}/text_encoder"])
def test_folder_forms(encoders, location) -> None:
    path = location.format(root=encoders)
    assert locate_encoder(path, QWEN).model == encoders / "text_encoder"
    assert locate_encoder(path, QWEN).tokenizer == encoders / "tokenizer"


def test_fingerprint_does_not_depend_on_the_place(encoders, copy_of) -> None:
    assert locate_encoder(copy_of(), QWEN).fingerprint == locate_encoder(encoders, QWEN).fingerprint


def _only_pickle(root: Path) -> None:
    (root / "text_encoder" / "model.safetensors").rename(root / "text_encoder" / "pytorch_model.bin")


def _no_weights(root: Path) -> None:
    (root / "text_encoder" / "model.safetensors").unlink()


def _no_tokenizer(root: Path) -> None:
    (root / "tokenizer" / "tokenizer.json").unlink()


def _two_files(root: Path) -> None:
    (root / "text_encoder" / "more.safetensors").write_bytes(b"")


def _bad_config(root: Path) -> None:
    (root / "text_encoder" / "config.json").write_text("[]")


def _escaping_index(root: Path) -> None:
    index = {"weight_map": {"x": "../../outside.safetensors"}}
    (root / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_model(root: Path) -> None:
    (root / "text_encoder" / "config.json").write_text((root / "text_encoder_2" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_only_pickle, "only as pickle files"),
        (_no_weights, "no .safetensors weights"),
        (_no_tokenizer, "No tokenizer"),
        (_two_files, "2 .safetensors files"),
        (_bad_config, "not a JSON object"),
        (_escaping_index, "does not list"),
        (_other_model, "'clip_text_model', but Qwen2.5-VL is needed"),
    ],
)
def test_folder_mistakes_are_one_sentence_with_the_field(copy_of, change, message) -> None:
    root = copy_of()
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        embed(root, ["a cat"])
    assert caught.value.field == "text_encoder_qwen"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/no/such/folder", "does not exist"),
        ("no-such-folder", "does not exist"),
        ("some-org/some-model", "could not be fetched"),
        ("bad--org/../model", "does not exist"),
    ],
)
def test_missing_places_and_the_hub_without_a_network(encoders, location, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        embed(encoders, ["a cat"], clip=location)
    assert caught.value.field == "text_encoder_clip"
    assert "\n" not in caught.value.message


def test_hub_model_in_the_local_cache_is_used_without_a_network(encoders, tmp_path, monkeypatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def fake(name: str, **options: Any) -> str:
        asked.append(options)
        return str(encoders)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert locate_encoder("org/model", QWEN).model == encoders / "text_encoder"
    assert asked == [{"local_files_only": True}]


def test_file_instead_of_a_folder(encoders) -> None:
    with pytest.raises(UserError, match="Give the folder"):
        embed(encoders, ["a cat"], qwen=encoders / "text_encoder" / "model.safetensors")
