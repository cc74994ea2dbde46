"""The error family: sentences, fields and exit codes."""

from __future__ import annotations

import pytest

from backend.errors import EngineError, K5Error, Problem, Problems, Stopped, UserError


def test_exit_codes_of_the_family() -> None:
    assert UserError("no").exit_code == Problems([Problem(None, "no")]).exit_code == 2
    assert EngineError("broken", "decode").exit_code == K5Error("x").exit_code == 1
    assert Stopped("asked").exit_code == 0
    assert all(issubclass(kind, K5Error) for kind in (Problems, UserError, EngineError, Stopped))


def test_a_problem_names_its_flag() -> None:
    assert str(Problem("frames", "must be more.")) == "--frames: must be more."
    assert str(Problem(None, "Nothing to do.")) == "Nothing to do."


def test_problems_keep_order_fields_and_one_line_each() -> None:
    listed = [Problem("width", "is odd."), Problem(None, "is late."), Problem("seed", "is cold.")]
    error = Problems(listed)
    assert error.problems == tuple(listed)
    assert str(error).splitlines() == ["--width: is odd.", "is late.", "--seed: is cold."]


def test_user_error_is_one_problem() -> None:
    error = UserError("is missing.", "dit")
    assert isinstance(error, Problems)
    assert error.problems == (Problem("dit", "is missing."),)
    assert (error.message, error.field) == ("is missing.", "dit")


def test_problems_without_a_problem_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Problems([])


def test_engine_error_names_its_phase() -> None:
    error = EngineError("out of memory", "denoise")
    assert (str(error), error.message, error.phase) == ("out of memory", "out of memory", "denoise")
