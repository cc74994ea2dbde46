"""The sentences of the page by key, in the language of the settings."""

from __future__ import annotations

from collections.abc import Mapping

from k5ui.text import en, ru

LANGUAGES: dict[str, Mapping[str, str]] = {"en": en.TEXTS, "ru": ru.TEXTS}
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
    """The texts that our scripts use (keys that start with `js.`)."""
    return {key: text for key, text in LANGUAGES[Texts(language).language].items() if key.startswith("js.")}
