"""Optimizers by name: the usual ones, any class of torch.optim, any class by its dotted path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from backend.config.train import TrainOptions
from backend.config.train_arguments import key_values
from backend.errors import Problem, Problems, UserError

_TYPE, _ARGUMENTS = "optimizer_type", "optimizer_args"
# Known names, in any case (guides write AdamW8Bit): where the class is.
_KNOWN = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# Whatever a foreign class throws at values that it does not understand.
_REFUSALS = (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError, ArithmeticError)
_TRIAL_SIDE = 8
_USUAL_RATE_OF_ADAPTIVE = 0.1


def make_optimizer(groups: Sequence[Mapping[str, Any]], options: TrainOptions) -> Optimizer:
    """The optimizer that `options` name, over `groups` of parameters with a learning rate each, ready to train.

    AdamW, AdamW8bit (bitsandbytes) and Adafactor (of transformers) are known in any case; another name is a class of
    torch.optim, one with dots is imported. Arguments are tried on a small tensor first, so that what only a step would
    find is said here. Adafactor with relative_step, its default, takes no learning rate; see `optimizer_notices`.

    Raises:
        Problems: at optimizer_type (unknown, not installed, no Optimizer, cannot train a LoRA), at optimizer_args
            (unknown ones, values that the class refuses) or at learning_rate.
    """
    cls = optimizer_class(options.optimizer_type)
    arguments = _checked_arguments(cls, options)
    groups = [dict(group) for group in groups]
    if _relative_step(cls, arguments):
        for group in groups:
            group.pop("lr", None)
    elif "lr" in inspect.signature(cls).parameters:
        arguments["lr"] = options.learning_rate
    first = groups[0]["params"][0]
    try:
        _try_step(cls, groups, arguments, first.device)
        optimizer = cls(groups, **arguments)
    except _REFUSALS as error:
        raise _refusal(cls, options, error, len(groups)) from error
    set_mode(optimizer, train=True)
    return optimizer


def optimizer_class(name: str) -> type[Optimizer]:
    """The class that `name` means: a known name in any case, a class of torch.optim, or a dotted path.

    Raises:
        UserError: at optimizer_type; there is no such class, it cannot be imported, or it is no torch Optimizer.
    """
    name = name.strip()
    path = _KNOWN.get(name.lower(), name)
    if "." not in path:
        path = f"torch.optim.{_torch_name(path)}"
    if not _DOTTED.fullmatch(path):
        raise UserError(f"{name[:80]!r} is no class. Write AdamW, or a path like prodigyopt.Prodigy.", _TYPE)
    found = _imported(path)
    if not (isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer):
        raise UserError(f"{path} is not a torch Optimizer. Name a class that is one.", _TYPE)
    return found


def optimizer_notices(options: TrainOptions) -> list[Problem]:
    """What a person should know about the optimizer of `options` and would not see otherwise; nothing of it is wrong.

    Raises:
        Problems: as `make_optimizer`, for names and arguments.
    """
    cls = optimizer_class(options.optimizer_type)
    arguments = _checked_arguments(cls, options)
    takes = inspect.signature(cls).parameters
    if _relative_step(cls, arguments):
        text = (
            f"{cls.__name__} sets its own learning rate (relative_step), so --learning_rate, the schedule, its warm-up "
            "and loraplus_lr_ratio have no effect. Add --optimizer_args relative_step=False to use them."
        )
        return [Problem(_TYPE, text)]
    notices = []
    if "d0" in takes and options.learning_rate < _USUAL_RATE_OF_ADAPTIVE:
        text = (
            f"{options.learning_rate:g} is multiplied by the step size that {cls.__name__} finds by itself, so 1 is "
            "the usual value; with less it hardly learns."
        )
        notices.append(Problem("learning_rate", text))
    if hasattr(cls, "eval") and options.lr_scheduler != "constant":
        text = f"{cls.__name__} needs no schedule: it averages instead. constant is the usual one with it."
        notices.append(Problem("lr_scheduler", text))
    return notices


def set_mode(optimizer: Optimizer, train: bool) -> None:
    """Put the parameters of a schedule-free optimizer to what it trains, or to the averages that are to be used.

    Every other optimizer is left alone. The way there and back rounds: whoever needs the very same numbers afterwards
    keeps a copy of them.
    """
    switch = getattr(optimizer, "train" if train else "eval", None)
    if switch is not None:
        switch()


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group as it takes effect.

    d * lr where the optimizer finds a factor d by itself (Prodigy, D-adaptation), the rate of the last step where it
    warms up by itself (schedule-free), and min(0.01, 1 / sqrt(step)) times the size of the first parameter for
    Adafactor with relative_step (0 before its first step).
    """
    return [_rate(optimizer, group) for group in optimizer.param_groups]


def uses_relative_step(optimizer: Optimizer) -> bool:
    """Whether this is an Adafactor that sets its own learning rate, beside which a schedule has no effect."""
    return bool(optimizer.defaults.get("relative_step"))


def _rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    if group.get("relative_step"):
        return _relative_rate(optimizer, group)
    if group.get("k", 0) > 0 and "scheduled_lr" in group:
        return float(group["scheduled_lr"])
    return float(group["lr"]) * float(group.get("d", 1.0))


def _relative_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    state = next((optimizer.state[one] for one in group["params"] if "step" in optimizer.state.get(one, {})), None)
    if state is None:
        return 0.0
    highest = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
    rate = min(highest, 1.0 / math.sqrt(state["step"]))
    return rate * (max(group["eps"][1], float(state["RMS"])) if group["scale_parameter"] else 1.0)


def _torch_name(name: str) -> str:
    classes = [key for key, value in vars(torch.optim).items() if isinstance(value, type) and key != "Optimizer"]
    by_case = {key.lower(): key for key in classes}
    if name.lower() in by_case:
        return by_case[name.lower()]
    known = ["AdamW8bit", *classes]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else "Write AdamW, AdamW8bit, Adafactor, or a path with dots."
    raise UserError(f"{name[:80]!r} is no optimizer of torch.optim. {hint}", _TYPE)


def _imported(path: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.partition(".")[0]
        raise UserError(
            f"{path} cannot be imported ({error}). Install {package} for this Python, or correct the path.",
            _TYPE,
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(f"{module_name} has no {attribute}. Check the spelling.", _TYPE)
    return found


def _checked_arguments(cls: type[Optimizer], options: TrainOptions) -> dict[str, Any]:
    arguments = key_values(options.optimizer_args, _ARGUMENTS)
    takes = inspect.signature(cls).parameters
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
    names = [name for name in takes if name not in ("params", "lr", "self")]
    problems = []
    for name in arguments:
        if name == "lr":
            problems.append(Problem(_ARGUMENTS, "lr is --learning_rate. Give it there."))
        elif name == "params" or not (anything or name in names):
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"It takes {', '.join(names)}."
            problems.append(Problem(_ARGUMENTS, f"{cls.__name__} has no argument {name}. {hint}"))
    if problems:
        raise Problems(problems)
    return arguments


def _relative_step(cls: type[Optimizer], arguments: Mapping[str, Any]) -> bool:
    parameter = inspect.signature(cls).parameters.get("relative_step")
    return parameter is not None and bool(arguments.get("relative_step", parameter.default))


def _try_step(
    cls: type[Optimizer], groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], device: torch.device
) -> None:
    """One step over a small parameter in each group; raises whatever the class raises."""
    small = []
    for group in groups:
        parameter = torch.nn.Parameter(torch.ones(_TRIAL_SIDE, _TRIAL_SIDE, device=device))
        parameter.grad = torch.full_like(parameter, 1e-3)
        small.append({**group, "params": [parameter]})
    optimizer = cls(small, **arguments)
    set_mode(optimizer, train=True)
    optimizer.step()


def _refusal(cls: type[Optimizer], options: TrainOptions, error: Exception, groups: int) -> UserError:
    reason = str(error).strip().rstrip(".") or type(error).__name__
    if groups > 1 and "group" in reason:
        text = f"{cls.__name__} cannot give up matrices their own learning rate: {reason}. Leave loraplus_lr_ratio out."
        return UserError(text, "network_args")
    if "learning rate" in reason.lower():
        return UserError(f"{cls.__name__} cannot use {options.learning_rate:g}: {reason}.", "learning_rate")
    if "closure" in reason or "sparse" in reason.lower():
        return UserError(f"{cls.__name__} cannot train a LoRA: {reason}. Choose another optimizer.", _TYPE)
    given = " ".join(options.optimizer_args) or "its default arguments"
    return UserError(f"{cls.__name__} refuses {given[:300]}: {reason}. Correct or leave out what it names.", _ARGUMENTS)
