"""TensorBoard and wandb beside the journal, through accelerate's trackers; wandb stays offline unless told otherwise.

Names of the curves are those that users of command-line trainers know: loss/current, loss/average, lr/unet, max_norm.
"""

from __future__ import annotations

import tomllib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from time import localtime, strftime
from typing import TYPE_CHECKING, Any

from backend.config.options import specs
from backend.config.train import TrainOptions
from backend.errors import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class Trackers:
    """The trackers that `--log_with` and `--logging_dir` ask for; none in processes other than the first.

    Args:
        window: steps over which loss/average is the mean: those of an epoch.
    """

    def __init__(self, options: TrainOptions, window: int, *, first: bool) -> None:
        """Open them.

        Raises:
            UserError: a tracker is not installed, or does not accept what the tracker configuration says.
        """
        self._losses: deque[float] = deque(maxlen=max(window, 1))
        self._trackers: list[GeneralTracker] = []
        names = chosen_trackers(options) if first else []
        if not names:
            return
        # Made for this run alone, so that two attempts do not draw one zigzag.
        folder = None
        if options.logging_dir is not None:
            folder = Path(options.logging_dir, f"{options.log_prefix or ''}{strftime('%Y%m%d%H%M%S', localtime())}")
            folder.mkdir(parents=True, exist_ok=True)
        given = _tracker_arguments(options)
        for name in names:
            self._trackers.append(_open(name, options, folder, given.get(name, {})))
        if options.log_config:
            for tracker in self._trackers:
                tracker.store_init_configuration(shown_options(options))

    def step(self, record: Mapping[str, Any]) -> None:
        """Hand on the record of one step."""
        if not self._trackers:
            return
        rates = record.get("lrs") or [record["lr"]]
        values = {f"lr/unet{f'_{number}' if number else ''}": rate for number, rate in enumerate(rates)}
        values |= {"memory_bytes": record["memory_bytes"], "seconds_per_step": record["seconds_per_step"]}
        if record["loss"] is not None:
            self._losses.append(record["loss"])
            values |= {"loss/current": record["loss"], "grad_norm": record["grad_norm"]}
        if self._losses:
            values["loss/average"] = fmean(self._losses)
        values |= {
            f"loss/band_{number}": loss for number, loss in enumerate(record["band_loss"], 1) if loss is not None
        }
        if "max_norm" in record:
            values["max_norm"] = record["max_norm"]
        self._log(values, record["step"])

    def epoch(self, step: int) -> None:
        """Say the mean loss of the epoch that has just ended."""
        if self._losses:
            self._log({"loss/epoch": fmean(self._losses)}, step)

    def validation(self, loss: float, step: int) -> None:
        """Hand on a validation."""
        self._log({"loss/validation": loss}, step)

    def close(self) -> None:
        """Write what waits and end."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)


def chosen_trackers(options: TrainOptions) -> list[str]:
    """The trackers that the options mean; --logging_dir alone means TensorBoard."""
    if options.log_with == "all":
        return ["tensorboard", "wandb"]
    if options.log_with is not None:
        return [options.log_with]
    return ["tensorboard"] if options.logging_dir is not None else []


def shown_options(options: TrainOptions) -> dict[str, str | int | float | bool]:
    """The options for a tracker, without paths (they tell about the machine) and secrets; lists as text."""
    shown: dict[str, str | int | float | bool] = {}
    for spec in specs(TrainOptions):
        value = getattr(options, spec.name)
        if spec.path is None and not spec.secret and value is not None:
            shown[spec.name] = value if isinstance(value, str | int | float | bool) else " ".join(map(str, value))
    return shown


def _tracker_arguments(options: TrainOptions) -> dict[str, dict[str, Any]]:
    """Tables [tensorboard] and [wandb] of --log_tracker_config; checked to be readable before."""
    if options.log_tracker_config is None:
        return {}
    values = tomllib.loads(Path(options.log_tracker_config).read_text("utf-8"))
    unknown = [
        name for name, value in values.items() if name not in ("tensorboard", "wandb") or not isinstance(value, dict)
    ]
    if unknown:
        raise UserError(
            f"{unknown[0]} is no tracker. Use tables called [tensorboard] and [wandb].", "log_tracker_config"
        )
    return values


def _open(name: str, options: TrainOptions, folder: Path | None, given: dict[str, Any]) -> GeneralTracker:
    # Here, because it takes seconds and most runs have none.
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    available = is_tensorboard_available() if name == "tensorboard" else is_wandb_available()
    if not available:
        raise UserError(f"{name} is not installed. Install it (pip install {name}), or leave it out.", "log_with")
    PartialState()  # The trackers ask it which process this is; one that was started alone has none yet.
    try:
        if name == "tensorboard":
            assert folder is not None
            tracker: GeneralTracker = TensorBoardTracker(options.log_tracker_name, str(folder), **given)
        else:
            place = {} if folder is None else {"dir": str(folder)}
            named = {} if options.wandb_run_name is None else {"name": options.wandb_run_name}
            # Nothing leaves the machine unless the configuration says so (mode = "online").
            tracker = WandBTracker(options.log_tracker_name, **{"mode": "offline"} | place | named | given)
        tracker.start()
    except TypeError as error:
        raise UserError(f"{name} does not accept this: {error}.", "log_tracker_config") from error
    return tracker
