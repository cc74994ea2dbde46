"""Pauses of Python's search for circles of objects while very many small ones are made, none of them in a circle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the collector from looking through everything again and again; half of the time goes there otherwise.

    Of several threads that are in here at once the first to leave turns it on again, which only costs the others time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
