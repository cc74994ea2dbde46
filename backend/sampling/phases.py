"""The phases of making a clip, and what goes wrong in them, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from backend.errors import EngineError, K5Error
from backend.progress import Reporter


@contextmanager
def phase(reporter: Reporter, name: str, message: str) -> Iterator[None]:
    """A phase of the run: announced, and named in whatever goes wrong inside it."""
    reporter.phase(name, message)
    with naming_faults(name, message):
        yield


@contextmanager
def naming_faults(name: str, message: str) -> Iterator[None]:
    """Turn what libraries raise in the block into an EngineError of phase `name`; the project's own errors pass."""
    try:
        yield
    except K5Error:
        raise
    except torch.OutOfMemoryError as error:
        advice = "Use a smaller size, fewer frames, --fp8_base or --blocks_to_swap."
        raise EngineError(f"The device ran out of memory while it worked on '{message}'. {advice}", name) from error
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        raise EngineError(f"{message}: {error}", name) from error
