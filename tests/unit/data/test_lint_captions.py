"""Captions: none, empty, equal, too long for the model, without the trigger word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from backend.config.tasks import TASKS, default_weights
from backend.data.lint.captions import caption_findings
from backend.data.lint.finding import Finding
from backend.data.lint.tokens import TokenCounter
from backend.data.scan import scan_dataset
from backend.errors import UserError
from backend.text.encoders import load_tokenizer
from backend.text.locate import QWEN, locate_encoder
from backend.text.templates import IMAGE, VIDEO
from tests.unit.data.dataset_folder import make_entry


@pytest.fixture(scope="module")
def encoder() -> Path:
    path = default_weights(TASKS["k5-demo-t2v"]).text_encoder_qwen
    assert path is not None
    return Path(path)


@pytest.fixture(scope="module")
def counter(encoder: Path) -> TokenCounter:
    return TokenCounter(encoder)


def _find(
    folder: Path,
    captions: Mapping[str, str | None],
    word: str | None = None,
    counter: TokenCounter | None = None,
    **keys: object,
) -> list[Finding]:
    entry = make_entry(folder, str(keys.pop("kind", "video")), **keys)
    ending = ".mp4" if entry.kind == "video" else ".png"
    for name, caption in captions.items():
        path = Path(entry.source) / f"{name}{ending}"
        path.write_bytes(b"not looked at")
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return caption_findings(entry, scan_dataset(entry), counter, word)


def _named(findings: list[Finding], kind: str) -> list[tuple[str, ...]]:
    return [tuple(Path(name).stem for name in one.identities) for one in findings if one.kind == kind]


def test_missing_empty_and_equal_captions(tmp_path: Path) -> None:
    captions = {"a": "a red ball", "b": " a red  ball\n", "c": "a blue ball", "d": None, "e": "  \n", "f": ""}
    found = _find(tmp_path, captions)
    assert _named(found, "no_caption") == [("d",)]
    assert _named(found, "empty_caption") == [("e",), ("f",)]
    assert _named(found, "equal_captions") == [("a", "b")]
    assert len(found) == 4
    assert {one.kind: one.severity for one in found} == {
        "no_caption": "error", "empty_caption": "warning", "equal_captions": "info",
    }  # fmt: skip


def test_an_empty_caption_behind_a_prefix_is_only_a_note(tmp_path: Path) -> None:
    [found] = _find(tmp_path, {"a": ""}, caption_prefix="zorb style")
    assert (found.kind, found.severity) == ("empty_caption", "info")


def test_a_caption_that_is_no_text_is_broken(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "video")
    (Path(entry.source) / "a.mp4").write_bytes(b"")
    (Path(entry.source) / "a.txt").write_bytes(b"\xff\xfe\x00")
    [found] = caption_findings(entry, scan_dataset(entry))
    assert (found.kind, found.identities) == ("broken", ("a.mp4",))
    assert "UTF-8" in found.message


def test_equal_captions_keep_their_id_when_a_source_joins(tmp_path: Path) -> None:
    [before] = _find(tmp_path / "x", {"a": "same", "b": "same"})
    [after] = _find(tmp_path / "x", {"c": "same"})
    assert before.id == after.id
    assert len(after.identities) == 3


@pytest.mark.parametrize("caption", ["a ZORB cat", "zorb", "the cat, zorb."])
def test_the_trigger_word_counts_in_any_case(tmp_path: Path, caption: str) -> None:
    assert _find(tmp_path, {"a": caption}, "zorb") == []


def test_captions_without_the_trigger_word(tmp_path: Path) -> None:
    found = _find(tmp_path / "some", {"a": "zorb cat", "b": "a cat", "c": "zorbing, a zorbs"}, " zorb ")
    assert _named(found, "missing_trigger") == [("b",), ("c",)]
    assert all("edit_caption" in one.fixes for one in found)
    [whole] = _find(tmp_path / "all", {"a": "a dog", "b": "a cat"}, "zorb")
    assert (whole.identities, whole.fixes) == (("a.mp4", "b.mp4"), ("add_prefix",))
    assert _find(tmp_path / "prefix", {"a": "a dog", "b": "a cat"}, "zorb", caption_prefix="Zorb,") == []
    assert _find(tmp_path / "none", {"a": "a dog", "b": "a cat"}, None) == []
    odd = _find(tmp_path / "odd", {"a": "a dog (x", "b": "<s*> dog"}, "<s*>")
    assert _named(odd, "missing_trigger") == [("a",)]


def test_tokens_are_those_of_the_encoder(counter: TokenCounter, encoder: Path) -> None:
    """Trap: a count without template or end token is off by one, and a line break joins the template's own."""
    tokenizer = load_tokenizer(locate_encoder(encoder, QWEN))
    for template in (VIDEO, IMAGE):
        before = len(tokenizer(template.prefix, add_special_tokens=False)["input_ids"])
        for text in (
            "a",
            "a red ball, moving left",
            "\nline\n\n  two",
            "ünïcödé 猫 🐈",
            "<|im_end|> {}",
            "word " * 400,
        ):
            whole = tokenizer(template.wrap(text), add_special_tokens=False, verbose=False)["input_ids"]
            assert counter.tokens(text, template.name) == len(whole) - before


def test_captions_at_and_over_the_limit(tmp_path: Path, counter: TokenCounter) -> None:
    def caption(kind: str, extra: int) -> str:
        words = ["red"] * 600
        while counter.tokens(" ".join(words), kind) > counter.limit(kind) + extra:
            words.pop()
        assert counter.tokens(" ".join(words), kind) == counter.limit(kind) + extra
        return " ".join(words)

    for kind, limit in (("video", 256), ("image", 512)):
        captions = {"fits": caption(kind, 0), "over": caption(kind, 1)}
        assert _find(tmp_path / kind, captions, kind=kind) == []  # nothing is counted without a tokenizer
        [found] = _find(tmp_path / kind, captions, counter=counter, kind=kind)
        assert Path(found.identities[0]).stem == "over"
        assert found.values == {"tokens": limit + 1, "limit": limit}
        with_prefix = _find(tmp_path / kind, captions, counter=counter, kind=kind, caption_prefix="red")
        assert _named(with_prefix, "token_limit") == [("fits",), ("over",)]


def test_wrong_tokenizers_are_a_mistake_of_the_request(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        TokenCounter(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        TokenCounter(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        TokenCounter(tmp_path)
    assert error.value.field == "text_encoder_qwen"
    with pytest.raises(UserError, match="not the tokenizer of"):
        TokenCounter(encoder.parent / "tokenizer_2")
    assert TokenCounter(encoder.parent).path == TokenCounter(encoder).path
