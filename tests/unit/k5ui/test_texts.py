"""The sentences of the page: both languages complete, nothing unused is missing, nothing used is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from k5ui.generate_form import LEFT_OUT, SPECS
from k5ui.text import ru
from k5ui.text.loader import LANGUAGES, Texts, Words, page_texts

K5UI = Path(__file__).resolve().parents[3] / "k5ui"
EN, RU = LANGUAGES["en"], LANGUAGES["ru"]
PLACES = re.compile(r"\{(\w+)\}")


def test_both_languages_have_the_same_keys() -> None:
    """A sentence of one language has its counterpart in the other."""
    assert set(EN) == set(RU)


@pytest.mark.parametrize("key", sorted(EN))
def test_both_languages_fill_in_the_same_values(key: str) -> None:
    """`{names}` of a sentence are the same in both languages, and no sentence is empty."""
    assert set(PLACES.findall(EN[key])) == set(PLACES.findall(RU[key]))
    assert EN[key].strip()
    assert RU[key].strip()


def test_every_option_has_name_and_help() -> None:
    """Each option of generation has a label in both languages and its help in Russian; no help is left over."""
    assert {f"field.{name}" for name in SPECS} <= set(EN)
    assert set(ru.HELP) == set(SPECS)
    assert {f"group.{spec.group}" for spec in SPECS.values() if spec.name not in LEFT_OUT} <= set(EN)
    assert {f"unit.{spec.unit}" for spec in SPECS.values() if spec.unit} <= set(EN)


def test_keys_of_the_scripts_exist() -> None:
    """Whole keys in static/*.js are keys of the texts; keys that are put together have at least one ending."""
    used = set()
    for path in (K5UI / "static").glob("*.js"):
        used |= set(re.findall(r'"(js\.[a-z_.]+)"', path.read_text("utf-8")))
    assert len(used) > 50
    for key in used:
        if key.endswith((".", "_")):
            assert any(name.startswith(key) for name in EN), key
        else:
            assert key in EN


def test_no_text_is_left_over() -> None:
    """Every key is used somewhere, so that translations are not made for nothing."""
    sources = "".join(
        path.read_text("utf-8")
        for path in K5UI.rglob("*")
        if path.suffix in (".py", ".js") and path.parent.name != "text"
    )
    made = ("field.", "group.", "unit.", "js.state.", "js.phase.", "js.kind.", "js.col.", "js.fact.", "js.theme.")
    made += ("js.problem.", "example.", "settings.theme.", "size.")
    # Keys that are put together from a beginning and an ending: "js.caching.state." + state, f"caching.reason.{key}".
    begun = set(re.findall(r'"((?:js\.)?[a-z]+\.[a-z_.]*[._])(?:"|\{)', sources))
    made += tuple(begun)
    assert [key for key in EN if not key.startswith(made) and key not in sources] == []


def test_scripts_get_their_texts_in_one_language() -> None:
    """Only `js.` keys and the names of the tabs go to the page, and an unknown language is English."""
    assert all(key.startswith(("js.", "tab.")) for key in page_texts("ru"))
    assert page_texts("xx") == page_texts("en")
    assert Texts("ru")("generate.length_seconds", n=5) == "5 с"


def test_words_follow_the_language() -> None:
    """Attributes that are bound to keys are set anew after a change of language."""

    class Component:
        label = ""
        value = ""

    language = "en"
    words = Words(lambda: language)
    component = words.say(Component(), label="tab.runs", value=lambda texts: texts.language)
    assert (component.label, component.value) == ("Runs", "en")
    language = "ru"
    words.translate()
    assert (component.label, component.value) == ("Запуски", "ru")
