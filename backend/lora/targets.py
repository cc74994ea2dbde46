"""Which layer of a model each entry of a LoRA file means, decided by the model's own list of linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.errors import UserError
from backend.lora.alphas import FIELD
from backend.lora.formats import COMFYUI_PREFIX, DIFFUSERS_PREFIX, KOHYA_PREFIX, LoraFile, LoraWeights, listing
from backend.lora.modules import LoraLinear

# Wrappers add these to names: torch.compile to modules, PEFT and the pipelines of other software in front.
_COMPILE_MARK = "_orig_mod"
_DOTTED_PREFIXES = ("base_model.model.", "model.", "module.", DIFFUSERS_PREFIX, COMFYUI_PREFIX, f"{_COMPILE_MARK}.")
_WIDTH_LAYER = "self_attention.to_query"


@dataclass(frozen=True)
class Target:
    """A linear layer of a model: its dotted name, and where it hangs."""

    name: str
    parent: nn.Module
    attribute: str

    @property
    def layer(self) -> nn.Module:
        """The layer that is there now, a `LoraLinear` when branches are attached."""
        return getattr(self.parent, self.attribute)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]


def linear_targets(model: nn.Module) -> dict[str, Target]:
    """All linear layers of `model` by dotted name, also quantised and LoRA-carrying ones; names as if not compiled."""
    found: dict[str, Target] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        for attribute, child in module.named_children():
            name = path if attribute == _COMPILE_MARK else f"{path}.{attribute}".lstrip(".")
            if _is_linear(child):
                found[name] = Target(name, module, attribute)
            else:
                waiting.append((name, child))
    return found


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear | LoraLinear) or all(isinstance(size, int) for size in sizes)


def resolve(file: LoraFile, targets: Mapping[str, Target]) -> dict[str, LoraWeights]:
    """The pairs of `file` by the dotted names of the model's layers; see `resolve_layers`."""
    return resolve_layers(str(file.path), file.layers, targets)


def resolve_layers(
    source: str, layers: Mapping[str, LoraWeights], targets: Mapping[str, Target]
) -> dict[str, LoraWeights]:
    """The pairs of `layers`, which are named as in files, by the dotted names of the model's layers.

    kohya names are compared with every layer's name in underscores, dotted ones lose the prefixes that wrappers and
    other software put in front; no name is ever taken apart at its underscores.

    Raises:
        UserError: the LoRA was made for another model of the family, entries that match no layer, shapes that do not
            fit, two entries for one layer; up to ten are listed.
    """
    _refuse_other_width(source, layers, targets)
    by_underscores = {name.replace(".", "_"): name for name in targets}
    found: dict[str, LoraWeights] = {}
    unmatched: list[str] = []
    wrong: list[str] = []
    for stem, weights in layers.items():
        name = _kohya_name(stem, by_underscores) if stem.startswith(KOHYA_PREFIX) else _dotted_name(stem, targets)
        if name is None:
            unmatched.append(stem)
            continue
        if name in found:
            wrong.append(f"{stem}: a second entry for {name}")
        out_features, in_features = targets[name].shape
        given = (weights.up.shape[0], weights.down.shape[1])
        if given != (out_features, in_features):
            wrong.append(
                f"{stem}: made for {given[1]} -> {given[0]}, the model's layer is {in_features} -> {out_features}"
            )
        found[name] = weights
    if unmatched:
        raise UserError(
            f"{source}: {len(unmatched)} of {len(layers)} entries match no layer of the model. "
            f"Use a LoRA that was trained for this model:{listing(unmatched)}",
            FIELD,
        )
    if wrong:
        raise UserError(f"{source} does not fit the model. Use a LoRA that was trained for it:{listing(wrong)}", FIELD)
    return found


def _kohya_name(stem: str, by_underscores: Mapping[str, str]) -> str | None:
    return by_underscores.get(stem.removeprefix(KOHYA_PREFIX).replace(f"{_COMPILE_MARK}_", ""))


def _dotted_name(stem: str, targets: Mapping[str, Target]) -> str | None:
    name = stem
    while name not in targets:
        prefix = next((prefix for prefix in _DOTTED_PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            name = name.replace(f".{_COMPILE_MARK}.", ".")
            return name if name in targets else None
        name = name.removeprefix(prefix)
    return name


def _refuse_other_width(source: str, layers: Mapping[str, LoraWeights], targets: Mapping[str, Target]) -> None:
    """A LoRA for a wider or narrower model of the family fails at every layer; say that in one sentence instead."""
    endings = (f".{_WIDTH_LAYER}", f"_{_WIDTH_LAYER.replace('.', '_')}")
    widths = {weights.down.shape[1] for stem, weights in layers.items() if stem.endswith(endings)}
    own = {target.shape[1] for name, target in targets.items() if name.endswith(f".{_WIDTH_LAYER}")}
    if len(widths) == 1 and len(own) == 1 and widths != own:
        made_for, here = (_model_words(sizes.pop()) for sizes in (widths, own))
        raise UserError(f"{source} was made for {made_for}, this is {here}. Use a LoRA for this model.", FIELD)


def _model_words(width: int) -> str:
    names = [name for name, config in KNOWN_ARCHITECTURES.items() if config.model_dim == width]
    title = names[0].replace("_", " ").title() if names else ""
    return f"a Kandinsky 5 {title} model (width {width})" if title else f"a model of width {width}"
