"""How the learning rate goes on from step to step."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values, steps_of
from backend.errors import Problem, Problems, UserError
from backend.training.optimizers import uses_relative_step

REX_MINIMUM = 0.01
"""Lowest learning rate of REX as a share of the highest, unless another is given."""
_NAME, _CLASS, _ARGUMENTS = "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args"
_RATIO = "lr_scheduler_min_lr_ratio"
_WARMUP, _DECAY, _CYCLES = "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles"
# Which options a schedule looks at; the others have no effect with it.
_USES: Mapping[str, tuple[str, ...]] = {
    "constant": (_WARMUP,),
    "constant_with_warmup": (_WARMUP,),
    "linear": (_WARMUP,),
    "cosine": (_WARMUP, _CYCLES),
    "cosine_with_restarts": (_WARMUP, _CYCLES),
    "polynomial": (_WARMUP, "lr_scheduler_power", _ARGUMENTS),
    "inverse_sqrt": (_WARMUP, "lr_scheduler_timescale"),
    "cosine_with_min_lr": (_WARMUP, _CYCLES, _RATIO, _ARGUMENTS),
    "warmup_stable_decay": (_WARMUP, _DECAY, _CYCLES, _RATIO, _ARGUMENTS),
    "piecewise_constant": (_ARGUMENTS,),
    "adafactor": (),
    "rex": (_WARMUP, _RATIO),
}
_OPTIONS = (_WARMUP, _DECAY, _CYCLES, "lr_scheduler_power", "lr_scheduler_timescale", _RATIO, _ARGUMENTS)
# Arguments beyond the options, of the schedules that have some.
_EXTRA_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "polynomial": ("lr_end",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("warmup_type", "decay_type"),
    "piecewise_constant": ("step_rules",),
}


class Schedule(Protocol):
    """Sets the learning rate of every group; `step` is called once after each optimizer step."""

    def step(self) -> None:
        """Go on to the next step's learning rate."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on; the learning rates themselves belong to the optimizer's state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


class OwnRates:
    """The schedule of an optimizer that sets its learning rate itself: it counts steps and changes nothing."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        """Count a step."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a count."""
        self.steps = int(state_dict["steps"])


def make_schedule(optimizer: Optimizer, options: TrainOptions, total_steps: int) -> Schedule:
    """The schedule that `options` name, for a training of `total_steps` optimizer steps; the first rate is set at once.

    Formulas: transformers' schedules and diffusers' piecewise_constant; REX (Chen et al., 2021) with a minimum:
    min + (max - min) * z / (0.1 + 0.9 z), z = share of the steps after the warm-up that is left. Warm-ups are linear
    from 0 (warmup_stable_decay: from its minimum). The number of cycles counts half waves of the cosine and restarts.
    `constant` with a warm-up is constant_with_warmup. An optimizer that sets its own rates gets `OwnRates`.

    Raises:
        Problems: lengths longer than the training, unknown or refused arguments, a class that is no schedule.
    """
    arguments = key_values(options.lr_scheduler_args, _ARGUMENTS)
    # Also where it has no effect: what is stored with the LoRA says how many steps it was.
    warmup = steps_of(options.lr_warmup_steps, total_steps, _WARMUP)
    if uses_relative_step(optimizer):
        return OwnRates()
    if options.lr_scheduler_type is not None:
        return _by_class(optimizer, options.lr_scheduler_type, arguments)
    name = options.lr_scheduler
    if name == "adafactor":
        raise UserError(
            "adafactor belongs to --optimizer_type Adafactor with relative_step. Choose another schedule.", _NAME
        )
    _check_names(name, arguments, _EXTRA_ARGUMENTS.get(name, ()))
    if name == "rex":
        ratio = options.lr_scheduler_min_lr_ratio
        shape = partial(_rex, warmup, total_steps, REX_MINIMUM if ratio is None else ratio)
        return LambdaLR(optimizer, shape)
    if name == "piecewise_constant":
        return _piecewise(optimizer, arguments)
    if name == "constant" and warmup > 0:
        name = "constant_with_warmup"
    return _of_transformers(
        optimizer, name, {**_settings(name, options, total_steps, arguments), **arguments}, warmup, total_steps
    )


def schedule_notices(options: TrainOptions) -> list[Problem]:
    """Options of the schedule that were given and have no effect with the one that is used."""
    if options.lr_scheduler_type is not None:
        uses, shown = (_ARGUMENTS,), f"--lr_scheduler_type {options.lr_scheduler_type}"
    else:
        uses, shown = _USES[options.lr_scheduler], f"--lr_scheduler {options.lr_scheduler}"
    fields = type(options).model_fields
    unused = [
        name
        for name in _OPTIONS
        if name not in uses and getattr(options, name) != fields[name].get_default(call_default_factory=True)
    ]
    return [Problem(name, f"has no effect with {shown}. Leave it out.") for name in unused]


def _settings(name: str, options: TrainOptions, total: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' function for `name` takes from the options."""
    half_waves = options.lr_scheduler_num_cycles / 2.0
    ratio = options.lr_scheduler_min_lr_ratio
    if name == "cosine":
        return {"num_cycles": half_waves}
    if name == "cosine_with_restarts":
        return {"num_cycles": options.lr_scheduler_num_cycles}
    if name == "polynomial":
        return {"power": options.lr_scheduler_power}
    if name == "inverse_sqrt":
        return {"timescale": options.lr_scheduler_timescale}
    if name == "cosine_with_min_lr":
        if ratio is None and not {"min_lr", "min_lr_rate"} & arguments.keys():
            raise UserError("is needed by cosine_with_min_lr. Give for example 0.1.", _RATIO)
        return {"num_cycles": half_waves, **({} if ratio is None else {"min_lr_rate": ratio})}
    if name == "warmup_stable_decay":
        decay = steps_of(options.lr_decay_steps, total, _DECAY)
        if steps_of(options.lr_warmup_steps, total, _WARMUP) + decay > total:
            raise UserError(f"Warm-up and decay together are longer than the {total} steps. Shorten one.", _DECAY)
        return {"num_decay_steps": decay, "num_cycles": half_waves, "min_lr_ratio": ratio or 0.0}
    return {}


def _of_transformers(optimizer: Optimizer, name: str, settings: dict[str, Any], warmup: int, total: int) -> LRScheduler:
    from transformers.optimization import get_scheduler

    # The polynomial divides by the steps after the warm-up, also when there are none.
    total = max(total, warmup + 1) if name == "polynomial" else total
    try:
        return get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=settings
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} cannot be used: {error}.", _ARGUMENTS if name in _EXTRA_ARGUMENTS else _NAME
        ) from error


def _piecewise(optimizer: Optimizer, arguments: Mapping[str, Any]) -> LRScheduler:
    from diffusers.optimization import get_piecewise_constant_schedule

    example = "Give for example step_rules=1:100,0.1:200,0.01 (factor 1 to step 100, 0.1 to 200, then 0.01)."
    if "step_rules" not in arguments:
        raise UserError(f"piecewise_constant needs its rules. {example}", _ARGUMENTS)
    try:
        return get_piecewise_constant_schedule(optimizer, str(arguments["step_rules"]))
    except ValueError as error:
        raise UserError(f"step_rules cannot be read ({error}). {example}", _ARGUMENTS) from error


def _rex(warmup: int, total: int, minimum: float, step: int) -> float:
    if step < warmup:
        return step / warmup
    left = max(0.0, (total - step) / max(1, total - warmup))
    return minimum + (1.0 - minimum) * left / (0.1 + 0.9 * left)


def _by_class(optimizer: Optimizer, name: str, arguments: Mapping[str, Any]) -> LRScheduler:
    cls = _schedule_class(name.strip())
    parameters = inspect.signature(cls).parameters
    _check_names(name, arguments, [one for one in parameters if one not in ("self", "optimizer", "last_epoch")])
    try:
        return cls(optimizer, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
        raise UserError(f"{cls.__name__} refuses its arguments: {error}. Correct them.", _ARGUMENTS) from error


def _schedule_class(name: str) -> type[LRScheduler]:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else lr_scheduler
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"{name[:80]} cannot be imported ({error}). Correct the path, or install it.", _CLASS
        ) from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, LRScheduler) and found is not LRScheduler):
        raise UserError(f"{name[:80]!r} is no schedule of torch. Name one like CosineAnnealingLR.", _CLASS)
    if issubclass(found, lr_scheduler.ReduceLROnPlateau):
        raise UserError(f"{attribute} needs a measured value at each step, which training does not give it.", _CLASS)
    return found


def _check_names(name: str, arguments: Mapping[str, Any], known: Any) -> None:
    problems = []
    for argument in arguments:
        if argument not in known:
            close = difflib.get_close_matches(argument, known, n=1)
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            hint = f"Did you mean {close[0]}?" if close else takes
            problems.append(Problem(_ARGUMENTS, f"{name} has no argument {argument}. {hint}"))
    if problems:
        raise Problems(problems)
