"""Counts the tokens of captions as the text encoder will, with its tokenizer alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import UserError
from backend.text.locate import QWEN
from backend.text.templates import IMAGE, VIDEO

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from backend.text.templates import PromptTemplate

_FILE = "tokenizer.json"
_TEMPLATES = {"video": VIDEO, "image": IMAGE}


class TokenCounter:
    """Counts tokens with the tokenizer of Qwen2.5-VL; no weights and no torch are loaded."""

    def __init__(self, location: str | Path) -> None:
        """Load the tokenizer of an encoder's folder (or of the `tokenizer` folder in or beside it).

        Raises:
            UserError: there is none, or it is damaged or another model's.
        """
        from tokenizers import Tokenizer

        self.path = _find(Path(location).expanduser())
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises plain exceptions; whatever it is, the file is wrong
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"{self.path} cannot be loaded ({reason}). Get it again.", QWEN.field) from error
        # A file may ask for cut-off or padded texts, which would hide what is counted here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._before = {kind: self._count(template.prefix) for kind, template in _TEMPLATES.items()}
        if self._count(VIDEO.suffix) != 1:
            raise UserError(
                f"{self.path} does not know {VIDEO.suffix}, so it is not the tokenizer of Qwen2.5-VL. Give its folder.",
                QWEN.field,
            )

    def tokens(self, caption: str, kind: str) -> int:
        """Tokens of a caption in the template of "video" or "image" that count against `limit`, end token included."""
        return self._count(_template(kind).wrap(caption)) - self._before[kind]

    @staticmethod
    def limit(kind: str) -> int:
        """The largest number of tokens that the model reads of captions of "video" or "image"."""
        return _template(kind).max_length

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _template(kind: str) -> PromptTemplate:
    return _TEMPLATES[kind]


def _find(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is no folder. Give the folder of a {QWEN.label} model.", QWEN.field)
    folders = (root, root / QWEN.folder, root / QWEN.tokenizer_folder, root.parent / QWEN.tokenizer_folder)
    for folder in folders:
        if os.path.isfile(folder / _FILE):
            return folder / _FILE
    raise UserError(f"{root} has no {_FILE}. Give the folder of a {QWEN.label} model.", QWEN.field)
