"""Which layers of a model a LoRA is trained for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from backend.errors import Problem, Problems

FIELD = "network_args"
_BLOCK_LISTS = ("text_transformer_blocks.", "visual_transformer_blocks.")
_NEVER = "modulation"


def trainable_names(names: Iterable[str]) -> list[str]:
    """The layers that can be trained, in the order of the model: attention and feed-forward of all blocks.

    Modulation layers are left out, as in every LoRA of this family (Pro has 624 layers, Lite 332). `names` are dotted
    names of linear layers in any order.
    """
    return sorted((name for name in names if name.startswith(_BLOCK_LISTS) and _NEVER not in name), key=_model_order)


def select_layers(
    names: Iterable[str], include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> list[str]:
    """Those of `trainable_names(names)` that match one of `include` and none of `exclude`; patterns match whole names.

    Without `include` every layer counts as included. A peer's patterns have no effect here and there (include never
    restricts, exclude never excludes), so a pattern that matches nothing is not passed over in silence.

    Raises:
        Problems: a pattern is no regular expression or matches no layer that can be trained, or no layer is left.
    """
    layers = trainable_names(names)
    problems: list[Problem] = []
    included = _matcher("include_patterns", include, layers, problems) if include else None
    excluded = _matcher("exclude_patterns", exclude, layers, problems) if exclude else None
    if problems:
        raise Problems(problems)
    chosen = [
        name
        for name in layers
        if (included is None or included(name)) and not (excluded is not None and excluded(name))
    ]
    if not chosen:
        raise Problems([Problem(FIELD, "exclude_patterns leave no layer to train. Exclude fewer.")])
    return chosen


def _matcher(
    argument: str, patterns: Sequence[str], layers: Sequence[str], problems: list[Problem]
) -> Callable[[str], bool]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            problems.append(
                Problem(FIELD, f"{argument}: {pattern[:80]!r} is no regular expression: {error}. Correct it.")
            )
            continue
        if not any(compiled[-1].fullmatch(name) for name in layers):
            example = f"for example {layers[-1]}" if layers else "this model has none"
            problems.append(
                Problem(
                    FIELD,
                    f"{argument}: {pattern[:80]!r} matches none of the {len(layers)} layers that can be trained. Write "
                    f"a regular expression for whole names ({example}); modulation layers are never trained.",
                )
            )
    return lambda name: any(pattern.fullmatch(name) for pattern in compiled)


def _model_order(name: str) -> tuple[tuple[int, int, str], ...]:
    # Block 10 comes after block 2; text blocks, which run first, come first by name already.
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))
