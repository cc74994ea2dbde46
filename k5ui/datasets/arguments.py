"""What the page sends with a verb: a JSON array of anything; each value is taken with the type that it must have."""

from __future__ import annotations

import os
from typing import Any

from backend.config.dataset_text import value_problem
from backend.errors import UserError

MAX_TEXT = 2_000_000
MAX_ITEMS = 200_000
_MAX_LIST = 20_000
_WRONG = "The page sent something that cannot be used. Load it again."


class Arguments:
    """The values of one call, by place.

    Every method raises:
        UserError: the value is missing, of another type, or too large.
    """

    def __init__(self, values: Any) -> None:
        self._values = values if isinstance(values, list) else [values]

    def text(self, place: int, limit: int = 4096, empty: bool = False) -> str:
        """Text of at most `limit` letters."""
        value = self._get(place)
        if not isinstance(value, str) or not (value or empty) or value_problem(value):
            raise UserError(_WRONG)
        if len(value) > limit:
            raise UserError(f"The text is too long: at most {limit} letters.")
        return value

    def path(self, place: int) -> str:
        """The path of a file or a folder; it is whole, because nobody at a page knows where the app was started."""
        value = self.text(place)
        if not os.path.isabs(os.path.expanduser(value)):
            raise UserError(f"{value} is no whole path. Give it from the first folder on.")
        return value

    def text_or_none(self, place: int, limit: int = 4096) -> str | None:
        """Text, None for null, for nothing and for empty text."""
        value = self._get(place)
        return None if value is None or value == "" else self.text(place, limit)

    def texts(self, place: int, limit: int = 4096) -> list[str]:
        """A list of texts; one text counts as a list of itself."""
        value = self._get(place)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > MAX_ITEMS:
            raise UserError(_WRONG)
        if not all(isinstance(item, str) and len(item) <= limit and not value_problem(item) for item in values):
            raise UserError(_WRONG)
        return values

    def texts_or_none(self, place: int) -> list[str] | None:
        """A list of texts, or None for null."""
        return None if self._get(place) is None else self.texts(place)

    def switch(self, place: int) -> bool:
        """True or false."""
        value = self._get(place)
        if not isinstance(value, bool):
            raise UserError(_WRONG)
        return value

    def index(self, place: int) -> int:
        """A whole number from 0."""
        value = self._get(place)
        if type(value) is not int or not 0 <= value < 1_000_000:
            raise UserError(_WRONG)
        return value

    def index_or_none(self, place: int) -> int | None:
        """A whole number from 0, or None for null."""
        return None if self._get(place) is None else self.index(place)

    def place(self, place: int) -> int | str:
        """The number of a table, or "general"."""
        return "general" if self._get(place) == "general" else self.index(place)

    def setting(self, place: int) -> Any:
        """A value that a key of a dataset file may have: text, number, switch, a list of texts or of numbers, None."""
        value = self._get(place)
        items = value if isinstance(value, list) else [value]
        plain = all(item is None or isinstance(item, str | bool | int | float) for item in items)
        size = sum(len(item) for item in items if isinstance(item, str))
        if not plain or len(items) > _MAX_LIST or size > MAX_TEXT or (isinstance(value, list) and None in items):
            raise UserError(_WRONG)
        if trouble := value_problem(value):
            raise UserError(f"The value {trouble}")
        return value

    def table(self, place: int) -> dict[str, Any]:
        """A JSON object."""
        value = self._get(place)
        if not isinstance(value, dict):
            raise UserError(_WRONG)
        return value

    def _get(self, place: int) -> Any:
        return self._values[place] if place < len(self._values) else None


def text_of(table: dict[str, Any], key: str) -> str:
    """A text of a JSON object, empty if it is missing or null.

    Raises:
        UserError: it is no text.
    """
    return Arguments([table.get(key) or ""]).text(0, MAX_TEXT, empty=True)
