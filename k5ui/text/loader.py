"""The sentences of the page by key, in the language of the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from k5ui.text import caching_en, caching_ru, dataset_en, dataset_ru, en, live_en, live_ru, ru, training_en, training_ru

Component = TypeVar("Component")

LANGUAGES: dict[str, Mapping[str, str]] = {
    "en": en.TEXTS | dataset_en.TEXTS | caching_en.TEXTS | live_en.TEXTS | training_en.TEXTS,
    "ru": ru.TEXTS | dataset_ru.TEXTS | caching_ru.TEXTS | live_ru.TEXTS | training_ru.TEXTS,
}
HELP: dict[str, Mapping[str, str]] = {"en": {}, "ru": ru.HELP}


class Texts:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"
        self._texts = LANGUAGES[self.language]
        self._help = HELP[self.language]

    def __call__(self, key: str, **values: object) -> str:
        """The sentence of `key` with its `{names}` filled in; an unknown key is a programmer's mistake (KeyError)."""
        return self._texts[key].format(**values)

    def help(self, option: str, english: str) -> str:
        """The help of an option: the definition's own sentence in English, its translation elsewhere."""
        return self._help.get(option, english)


def page_texts(language: str) -> dict[str, str]:
    """The texts that our scripts use: keys that start with `js.`, and the names of the tabs."""
    return {key: text for key, text in LANGUAGES[Texts(language).language].items() if key.startswith(("js.", "tab."))}


class Words:
    """The texts of the current language, and the components whose texts follow it.

    Components keep their texts as attributes; after a change of language `translate` sets them all, so that the next
    load of the page is in the new language.
    """

    def __init__(self, language: Callable[[], str]) -> None:
        self._language = language
        self._bound: list[tuple[Any, str, Callable[[Texts], Any]]] = []

    @property
    def now(self) -> Texts:
        """The texts of the current language."""
        return Texts(self._language())

    def say(self, component: Component, **texts: str | Callable[[Texts], Any]) -> Component:
        """Bind attributes of a component to keys, or to functions of the texts, and set them."""
        for attribute, text in texts.items():
            make = text if callable(text) else _by_key(text)
            self._bound.append((component, attribute, make))
            setattr(component, attribute, make(self.now))
        return component

    def translate(self) -> None:
        """Set all bound texts in the current language."""
        now = self.now
        for component, attribute, make in self._bound:
            setattr(component, attribute, make(now))


def _by_key(key: str) -> Callable[[Texts], str]:
    return lambda texts: texts(key)
