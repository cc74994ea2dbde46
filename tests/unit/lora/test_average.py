"""Averages of checkpoints against numpy, their order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.errors import UserError
from backend.lora.average import average_layers, ema_weights, gamma_of, power_weights, sorted_by_step
from backend.lora.formats import LoraFile, LoraWeights, read_lora, write_lora
from tests.unit.lora.models import random_lora, skeleton


def _run(count: int, **keys: float) -> list[tuple[str, dict[str, LoraWeights]]]:
    model = skeleton()
    return [(f"c{seed}", random_lora(model, seed=seed, **keys)) for seed in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("beta", "beta2"), [(0.95, None), (0.5, None), (0.5, 0.9), (0.0, None), (1.0, None)])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_exponential_average_equals_the_recurrence_in_numpy(beta: float, beta2: float | None, count: int) -> None:
    run = _run(count)
    found = average_layers(run, ema_weights(count, beta, beta2))
    for name in run[0][1]:
        expected = run[0][1][name].up.numpy().astype(np.float64)
        for index in range(1, count):
            share = 0.0 if count == 2 else (index - 1) / (count - 2)
            here = beta if beta2 is None else beta + (beta2 - beta) * share
            expected = here * expected + (1 - here) * run[index][1][name].up.numpy()
        assert np.allclose(found[name].up.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert found[name].alpha == run[0][1][name].alpha


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.25])
def test_power_average_has_the_relative_width_that_was_asked_for(sigma: float) -> None:
    """The closed form: t^gamma on (0, 1] has the standard deviation sigma (Karras et al. 2024, equation 126)."""
    gamma = gamma_of(sigma)
    assert gamma > 0
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    assert abs(variance**0.5 - sigma) < 1e-9
    weights = power_weights(2000, sigma)
    times = (np.arange(2000) + 0.5) / 2000
    mean = float(np.dot(weights, times))
    assert abs(float(np.dot(weights, (times - mean) ** 2)) ** 0.5 - sigma) < 2e-3


def test_power_average_weighs_checkpoints_by_differences_of_powers() -> None:
    exponent = gamma_of(0.15) + 1
    expected = [(t**exponent - (t - 1) ** exponent) / 7**exponent for t in range(1, 8)]
    assert np.allclose(power_weights(7, 0.15), expected)
    assert abs(sum(power_weights(7, 0.15)) - 1) < 1e-12


def test_equal_checkpoints_stay_as_they_are_to_the_last_bit() -> None:
    layers = random_lora(skeleton(), dtype=torch.bfloat16)
    found = average_layers([("a", layers), ("b", layers), ("c", layers)], ema_weights(3, 0.9))
    assert all(torch.equal(found[name].down, pair.down) for name, pair in layers.items())
    assert next(iter(found.values())).up.dtype == torch.bfloat16


@pytest.mark.parametrize("trouble", ["alpha", "rank", "layers"])
def test_other_runs_are_refused(trouble: str) -> None:
    model = skeleton()
    first = random_lora(model)
    second = random_lora(model, alpha=9.0) if trouble == "alpha" else random_lora(model, rank=5)
    if trouble == "layers":
        second = {name: pair for name, pair in first.items() if "cross" not in name}
    with pytest.raises(UserError, match={"alpha": "alpha 9", "rank": "rank 5", "layers": "other layers"}[trouble]):
        average_layers([("a", first), ("b", second)], [0.5, 0.5])


def _file(folder: Path, name: str, step: str | None = None) -> LoraFile:
    path = folder / f"{name}.safetensors"
    write_lora(path, random_lora(skeleton()), metadata={"ss_steps": step} if step else {})
    return read_lora(path)


def test_order_is_that_of_the_steps_not_of_the_arguments(tmp_path: Path) -> None:
    by_metadata = [_file(tmp_path, f"m{step}", str(step)) for step in (1000, 90, 500)]
    assert [file.path.stem for file in sorted_by_step(by_metadata)] == ["m90", "m500", "m1000"]
    # Names decide when the metadata is silent: the last file of a run has no number.
    names = ("run", "run-step00000200", "run-step00000030")
    by_name = [_file(tmp_path, name) for name in names]
    assert [file.path.stem for file in sorted_by_step(by_name)] == [names[2], names[1], names[0]]
    epochs = [_file(tmp_path, name) for name in ("e-000010", "e-000009")]
    assert [file.path.stem for file in sorted_by_step(epochs)] == ["e-000009", "e-000010"]


def test_an_order_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    files = [_file(tmp_path, "one"), _file(tmp_path, "two"), _file(tmp_path, "three")]
    with pytest.raises(UserError, match="--no_sort"):
        sorted_by_step(files)
    same = [_file(tmp_path, "a", "5"), _file(tmp_path, "b", "5")]
    with pytest.raises(UserError, match="same step"):
        sorted_by_step(same)
