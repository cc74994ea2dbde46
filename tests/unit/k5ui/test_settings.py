"""Settings and drafts: whole files, plain values, nothing lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from backend.config.tasks import TASKS
from backend.errors import Problems, UserError
from k5ui.drafts import MAX_DRAFT_BYTES, Drafts
from k5ui.roots import Roots
from k5ui.settings import SHARED, Settings


@pytest.fixture
def settings(workspace: Path) -> Settings:
    return Settings(workspace / "settings.toml", Roots([workspace], exposed=False))


def test_defaults_without_a_file(settings: Settings) -> None:
    assert (settings.language, settings.theme, settings.lora_folder) == ("en", "auto", None)
    assert settings.models() == {}
    assert not settings.path.exists(), "reading writes nothing"


def test_demo_weights_are_there_without_any_setting(settings: Settings) -> None:
    weights = settings.weights_for("k5-demo-t2v")
    assert all(path and Path(path).is_dir() for path in vars(weights).values())
    assert settings.inspect(weights.dit, "dit").ok
    assert settings.inspect(weights.vae, "vae").ok
    wrong = settings.inspect(weights.vae, "dit")
    assert not wrong.ok
    assert "VAE" in wrong.text


def test_values_survive_another_program_and_comments_survive_us(settings: Settings) -> None:
    settings.path.write_text('# my models\nlanguage = "ru" # language\nfuture = 1\n')
    assert settings.language == "ru"
    settings.update(theme="dark")
    settings.set_weights(SHARED, vae="/models/vae.safetensors")
    text = settings.path.read_text()
    assert "# my models" in text
    assert "# language" in text
    assert "future = 1" in text
    again = Settings(settings.path, Roots([], exposed=False))
    assert (again.language, again.theme) == ("ru", "dark")
    assert again.models() == {SHARED: {"vae": "/models/vae.safetensors"}}
    settings.update(theme=None)
    assert again.theme == "auto"


def test_weights_of_tasks(settings: Settings) -> None:
    settings.set_weights(SHARED, vae="/m/vae", text_encoder_qwen="Qwen/Qwen2.5-VL-7B-Instruct")
    settings.set_weights("k5-pro-t2v-5s-sd", dit="/m/pro", vae="/m/own-vae")
    sd, hd = settings.weights_for("k5-pro-t2v-5s-sd"), settings.weights_for("k5-pro-t2v-5s-hd")
    assert (sd.dit, sd.vae) == ("/m/pro", "/m/own-vae")
    assert TASKS["k5-pro-t2v-5s-hd"].checkpoint == TASKS["k5-pro-t2v-5s-sd"].checkpoint
    assert (hd.dit, hd.vae) == ("/m/pro", "/m/vae"), "the same file serves both, but each has its own VAE"
    assert sd.text_encoder_qwen == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert sd.text_encoder_clip == "openai/clip-vit-large-patch14"
    assert settings.weights_for("k5-lite-t2v-5s-sd").dit is None
    settings.set_weights("k5-pro-t2v-5s-sd", dit="", vae=None)
    assert settings.weights_for("k5-pro-t2v-5s-hd").dit is None


@pytest.mark.parametrize("path", ['quote".safetensors', "new\\line", "Ж µ.safetensors", "a'b", "x" * 300])
def test_odd_paths_come_back_as_they_were(settings: Settings, path: str) -> None:
    settings.set_weights("k5-pro-t2v-5s-sd", dit=f"/m/{path}")
    again = Settings(settings.path, Roots([], exposed=False))
    assert again.weights_for("k5-pro-t2v-5s-sd").dit == f"/m/{path}"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s: s.update(language="de"), "language"),
        (lambda s: s.update(theme="pink"), "theme"),
        (lambda s: s.update(colour="pink"), "colour"),
        (lambda s: s.set_weights("k5-nothing", dit="/x"), "task"),
        (lambda s: s.set_weights("k5-pro-t2v-5s-sd", lora="/x"), "lora"),
        (lambda s: s.set_weights(SHARED, dit="/x"), "dit"),
        (lambda s: s.set_weights("k5-pro-t2v-5s-sd", dit="a\0b"), "dit"),
        (lambda s: s.set_weights("k5-pro-t2v-5s-sd", dit="a\nb"), "dit"),
        (lambda s: s.weights_for("k5-nothing"), "task"),
    ],
)
def test_mistakes_name_their_field_and_change_nothing(settings: Settings, call, field: str) -> None:
    with pytest.raises(Problems) as error:
        call(settings)
    assert [problem.field for problem in error.value.problems] == [field]
    assert not settings.path.exists()


@pytest.mark.parametrize(
    "text", ["language = ", 'language = "de"', "models = 3", 'theme = 1\n[models.a]\ndit = "x"', "\xff"]
)
def test_a_damaged_file_is_reported_and_never_overwritten(workspace: Path, text: str) -> None:
    path = workspace / "settings.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"settings\.toml"):
        Settings(path, Roots([], exposed=False))
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.parametrize("path", [None, "", "  ", "/nowhere/x.safetensors", "a\0b"])
def test_inspecting_what_is_not_there(settings: Settings, path: str | None) -> None:
    found = settings.inspect(path)
    assert not found.ok
    assert found.text
    assert settings.inspect("Qwen/Qwen2.5-VL-7B-Instruct", "text_encoder_qwen").ok


# --- drafts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def drafts(workspace: Path) -> Drafts:
    return Drafts(workspace / "drafts")


def test_a_draft_comes_back_as_it_was(drafts: Drafts) -> None:
    values = {"prompt": 'два слова\nand "quotes"', "steps": 50, "guidance": 5.5, "loras": [{"path": "a"}], "x": None}
    assert drafts.load("generate") == {}
    assert drafts.save("generate", values)
    assert not drafts.save("generate", dict(reversed(values.items()))), "saying the same again writes nothing"
    assert drafts.load("generate") == values
    drafts.clear("generate")
    assert drafts.load("generate") == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"a":' * 5000, b" " * (MAX_DRAFT_BYTES + 2)])
def test_a_damaged_draft_is_an_empty_form(drafts: Drafts, content: bytes) -> None:
    drafts.folder.mkdir()
    (drafts.folder / "generate.json").write_bytes(content)
    assert drafts.load("generate") == {}
    assert drafts.save("generate", {"a": 1})
    assert drafts.load("generate") == {"a": 1}


@pytest.mark.parametrize("tab", ["../settings", "", "A", "a/b", "a.b", "a\0", "x" * 100])
def test_names_of_tabs(drafts: Drafts, tab: str) -> None:
    for action in (lambda: drafts.load(tab), lambda: drafts.save(tab, {}), lambda: drafts.clear(tab)):
        with pytest.raises(UserError):
            action()


def test_what_cannot_be_kept(drafts: Drafts) -> None:
    for values in ({"a": object()}, {"a": "x" * MAX_DRAFT_BYTES}):
        with pytest.raises(UserError):
            drafts.save("generate", values)
    assert drafts.save("generate", {"a": "half of a pair: \ud800"})
    assert isinstance(drafts.load("generate")["a"], str)


def test_many_pages_at_once_leave_one_whole_draft(drafts: Drafts) -> None:
    def write(number: int) -> None:
        for _ in range(10):
            drafts.save("generate", {"writer": number, "text": "x" * 5000})
            assert drafts.load("generate")["text"] == "x" * 5000

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drafts.load("generate")["writer"] in range(4)
