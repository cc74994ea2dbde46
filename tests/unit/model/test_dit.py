"""The DiT against diffusers on fully random weights, its batches, number formats and gradients."""

from __future__ import annotations

import random

import pytest
import torch

from backend.config.checkpoint import KNOWN_ARCHITECTURES
from backend.errors import UserError
from backend.model.dit import Kandinsky5Transformer
from backend.model.layers import gate_add, modulate
from backend.model.nabla import NablaConfig
from tests.unit.model.helpers import (
    LARGE_HEADS,
    SMALL_HEADS,
    build,
    build_diffusers,
    diffusers_forward,
    inputs,
    relative,
)

CONFIGS = {"heads of 64": SMALL_HEADS, "heads of 128": LARGE_HEADS}
SCALES = ((1.0, 2.0, 2.0), (1.0, 3.16, 3.16), (1.0, 1.0, 1.0))
SHAPES_PER_CONFIG = 11


def _random_cases(seed: int) -> list[tuple[int, tuple[int, int, int], int, tuple[float, float, float]]]:
    source = random.Random(seed)
    cases = [(2, (1, 2, 24), 1, SCALES[0])]
    for index in range(SHAPES_PER_CONFIG - 1):
        grid = (source.randint(1, 7), 2 * source.randint(1, 12), 2 * source.randint(1, 12))
        cases.append((source.randint(1, 3), grid, source.randint(1, 60), SCALES[index % 3]))
    return cases


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_diffusers(name: str) -> None:
    """Trap B27 (rope rounding): 22 random shapes, equal to float32 noise with that rounding, near it without."""
    config = CONFIGS[name]
    reference, rounded, exact = build_diffusers(config), build(config, rounding=True), build(config)
    for index, (batch, grid, text, scale) in enumerate(_random_cases(seed=len(name))):
        arguments = inputs(config, batch, grid, text, seed=index)
        expected = diffusers_forward(reference, arguments, scale)
        with torch.no_grad():
            found, without_rounding = (model(**arguments, scale_factor=scale) for model in (rounded, exact))
        case = f"{batch} x {grid}, {text} tokens, {scale}"
        assert found.shape == (batch, *grid, config.out_visual_dim), case
        assert relative(found, expected) < 1e-4, case
        assert relative(without_rounding, expected) < 1e-3, case
        assert text == 1 or relative(without_rounding, expected) > 1e-6, case


def test_unconditioned_model_agrees_with_diffusers() -> None:
    """A model of 16 input channels, as the image models have them."""
    from dataclasses import replace

    config = replace(SMALL_HEADS, visual_cond=False)
    arguments = inputs(config, 1, (2, 4, 6), 5, seed=1)
    expected = diffusers_forward(build_diffusers(config), arguments, SCALES[2])
    with torch.no_grad():
        assert relative(build(config, rounding=True)(**arguments, scale_factor=SCALES[2]), expected) < 1e-4


def test_text_longer_than_the_reference_table() -> None:
    """Trap: the reference's table ends at 1,024 text positions; ours has any length and the same numbers."""
    from backend.model.rope import text_table

    model = build(SMALL_HEADS)
    arguments = inputs(SMALL_HEADS, 1, (1, 4, 4), 1100, seed=3)
    with torch.no_grad():
        assert model(**arguments).isfinite().all()
    angles = 1099 * 10_000 ** (-torch.arange(32, dtype=torch.float64) / 32)
    table = text_table(1100, 64)
    assert torch.allclose(table.cos[1099, 0].double(), angles.cos(), atol=1e-4)
    assert torch.equal(table.cos[:60], text_table(60, 64).cos)


def test_latents_larger_than_the_reference_table() -> None:
    """Trap: the reference's table ends at 128 positions an axis (latents of 256 rows)."""
    arguments = inputs(SMALL_HEADS, 1, (1, 2, 264), 3, seed=4)
    with torch.no_grad():
        assert build(SMALL_HEADS)(**arguments).isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batch_equals_single_runs(name: str) -> None:
    """Traps B8, B10 and B27: padded text is masked as keys in both attentions, whatever the padding holds."""
    config, lengths = CONFIGS[name], (3, 17, 9)
    model = build(config)
    arguments = inputs(config, 3, (2, 4, 6), 20, seed=5)
    mask = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
    arguments["text_embeds"][~mask] = 50.0
    with torch.no_grad():
        together = model(**arguments, text_mask=mask)
        for index, length in enumerate(lengths):
            single = {key: value[index : index + 1] for key, value in arguments.items()}
            single["text_embeds"] = single["text_embeds"][:, :length]
            assert relative(together[index : index + 1], model(**single)) < 1e-5


def test_padding_of_the_whole_batch_is_cut() -> None:
    """Columns that nobody uses cost nothing and change nothing: bit for bit the packed text."""
    model = build(SMALL_HEADS)
    arguments = inputs(SMALL_HEADS, 2, (1, 4, 4), 12, seed=6)
    mask = torch.arange(12)[None].expand(2, 12) < 7
    with torch.no_grad():
        padded = model(**arguments, text_mask=mask)
        arguments["text_embeds"] = arguments["text_embeds"][:, :7]
        assert torch.equal(padded, model(**arguments))


def test_masks_with_holes_are_refused() -> None:
    """Left padding would shift positions (reference, section 3), and an empty text has no softmax."""
    model, arguments = build(SMALL_HEADS), inputs(SMALL_HEADS, 1, (1, 2, 2), 4, seed=7)
    for mask in ([[False, True, True, True]], [[True, False, True, True]], [[False] * 4]):
        with pytest.raises(ValueError, match="right"):
            model(**arguments, text_mask=torch.tensor(mask))
    with pytest.raises(ValueError, match="bool"):
        model(**arguments, text_mask=torch.ones(1, 4))


def test_bfloat16_policy_is_near_float32() -> None:
    """Traps B1 and B27: bfloat16 runs on the CPU without autocast, takes float32 inputs, and keeps the time exact."""
    for config in CONFIGS.values():
        arguments = inputs(config, 2, (3, 6, 4), 11, seed=8)
        mask = torch.arange(11)[None] < torch.tensor([[11], [4]])
        with torch.no_grad():
            expected = build(config)(**arguments, text_mask=mask)
            found = build(config).cast_policy(torch.bfloat16)(**arguments, text_mask=mask)
        assert found.dtype == torch.float32
        assert 1e-5 < relative(found, expected) < 2e-2


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_bfloat16_is_as_near_as_diffusers(tmp_path: object) -> None:
    """The policy is no coarser than that of diffusers' bfloat16 model."""
    from diffusers import Kandinsky5Transformer3DModel

    arguments = inputs(SMALL_HEADS, 1, (3, 6, 4), 11, seed=9)
    reference = build_diffusers(SMALL_HEADS)
    expected = diffusers_forward(reference, arguments, SCALES[0])
    reference.save_pretrained(tmp_path)
    half = Kandinsky5Transformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    rounded = {key: value if key == "timesteps" else value.to(torch.bfloat16) for key, value in arguments.items()}
    theirs = relative(diffusers_forward(half, rounded, SCALES[0]), expected)
    with torch.no_grad():
        ours = relative(build(SMALL_HEADS).cast_policy(torch.bfloat16)(**arguments), expected)
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("misuse", ["to", "bfloat16", "to after cast_policy", "back and forth"])
def test_islands_survive_casts(misuse: str) -> None:
    """Traps B27 and B1: `.to(bfloat16)` has the effect of `cast_policy`; islands keep their exact float32 values."""
    model, exact = build(SMALL_HEADS), build(SMALL_HEADS).state_dict()
    if misuse == "to":
        model.to(torch.bfloat16)
    elif misuse == "bfloat16":
        model.bfloat16()
    elif misuse == "to after cast_policy":
        model.cast_policy(torch.bfloat16).to(torch.bfloat16)
    else:
        model.to(torch.bfloat16).to(torch.float32).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    islands = 0
    for name, parameter in model.named_parameters():
        if "modulation" in name or "time_embeddings" in name or "norm" in name:
            islands += 1
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, exact[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
        assert parameter.dtype == model.policy_dtypes(torch.bfloat16)[name], name
    assert islands > 10
    arguments = inputs(SMALL_HEADS, 1, (1, 4, 4), 5, seed=10)
    with torch.no_grad():
        assert torch.equal(model(**arguments), build(SMALL_HEADS).cast_policy(torch.bfloat16)(**arguments))


def test_casts_to_other_formats_are_refused() -> None:
    """float16 overflows in this family's residual stream, so it is refused before anything is changed."""
    model = build(SMALL_HEADS)
    for cast in (model.half, model.double, lambda: model.cast_policy(torch.float16)):
        with pytest.raises(ValueError, match="float32 or bfloat16"):
            cast()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_islands_that_were_assigned_in_bfloat16_are_repaired() -> None:
    """`load_state_dict(assign=True)` brings the file's format; `cast_policy` makes the islands float32 again."""
    model = build(SMALL_HEADS)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.cast_policy(torch.bfloat16)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == model.policy_dtypes(
        torch.bfloat16
    )


def test_autocast_around_the_model_changes_nothing() -> None:
    """Trap B1: the reference works only inside autocast; here it has no effect."""
    model, arguments = build(SMALL_HEADS), inputs(SMALL_HEADS, 1, (1, 4, 4), 5, seed=11)
    with torch.no_grad():
        expected = model(**arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(**arguments), expected)


def test_batch_paths_of_modulation_agree() -> None:
    """One sample takes a fused path; both equal the plain formula, and gates the plain sum."""
    generator = torch.Generator().manual_seed(12)
    hidden, update = torch.randn(2, 3, 5, 16, generator=generator)
    shift, scale = torch.randn(2, 3, 1, 16, generator=generator)
    normed = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = normed * (1 + scale) + shift
    assert torch.allclose(modulate(hidden, shift, scale), expected, atol=1e-5)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.allclose(modulate(hidden[one], shift[one], scale[one]), expected[one], atol=1e-5)
    assert torch.allclose(gate_add(hidden, scale, update), hidden + scale * update, atol=1e-6)
    half = gate_add(hidden.bfloat16(), scale, update.bfloat16())
    assert torch.equal(half, (hidden.bfloat16().float() + scale * update.bfloat16().float()).bfloat16())


def test_time_is_not_rounded_in_bfloat16() -> None:
    """Trap B27: a bfloat16 model must not round the time (910.7 would become 912)."""
    model = build(SMALL_HEADS).cast_policy(torch.bfloat16)
    arguments = inputs(SMALL_HEADS, 2, (1, 4, 4), 5, seed=13)
    time = model.time_embeddings(torch.tensor([910.7, 912.0]))
    assert relative(time[0], time[1]) > 1e-3
    arguments["timesteps"] = torch.tensor([910.7, 912.0])
    assert torch.equal(time, build(SMALL_HEADS).time_embeddings(arguments["timesteps"]))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "nabla"])
def test_gradients_agree_with_finite_differences(sparse: bool) -> None:
    """Backward through padded text and NABLA, checked along a random direction of several weights."""
    model = build(SMALL_HEADS)
    nabla = NablaConfig(P=0.5, wT=1, wH=1, wW=1) if sparse else None
    grid = (2, 16, 32) if sparse else (2, 4, 4)
    arguments = inputs(SMALL_HEADS, 2, grid, 8, seed=14)
    mask = torch.arange(8)[None] < torch.tensor([[8], [3]])
    target = torch.randn(2, *grid, 16, generator=torch.Generator().manual_seed(15))

    def loss() -> torch.Tensor:
        return ((model(**arguments, text_mask=mask, nabla=nabla) - target) ** 2).mean()

    loss().backward()
    parameters = dict(model.named_parameters())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
    generator = torch.Generator().manual_seed(16)
    for name in (
        "text_transformer_blocks.0.self_attention.to_key.weight",
        "visual_transformer_blocks.1.self_attention.to_value.weight",
        "visual_transformer_blocks.1.cross_attention.to_query.weight",
        "visual_transformer_blocks.1.visual_modulation.out_layer.weight",
        "visual_embeddings.in_layer.weight",
    ):
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=generator)
        direction += parameter.grad / parameter.grad.norm() * direction.norm()
        direction /= direction.norm()
        expected = (parameter.grad * direction).sum().item()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * 3e-3 * direction
                values.append(loss().item())
                parameter -= sign * 3e-3 * direction
        # Moving q or k can move a block across NABLA's threshold, so the tolerance is wide.
        assert (values[0] - values[1]) / 6e-3 == pytest.approx(expected, rel=0.03, abs=2e-5), name


def test_tables_made_in_inference_mode_serve_training() -> None:
    """A sample between two training steps must not leave tensors behind that a backward pass refuses."""
    model, arguments = build(SMALL_HEADS), inputs(SMALL_HEADS, 1, (1, 4, 4), 5, seed=17)
    with torch.inference_mode():
        model(**arguments)
    model(**arguments).sum().backward()
    gradient = model.visual_embeddings.in_layer.weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())


def test_wrong_inputs_are_named() -> None:
    """Shapes that do not fit give one sentence."""
    model, good = build(SMALL_HEADS), inputs(SMALL_HEADS, 1, (1, 4, 4), 5, seed=18)
    for change, words in (
        ({"hidden_states": torch.zeros(1, 1, 4, 4, 16)}, "33"),
        ({"hidden_states": torch.zeros(1, 1, 3, 4, 33)}, "multiples of 16 pixels"),
        ({"text_embeds": torch.zeros(1, 5, 47)}, "text embeddings"),
        ({"text_embeds": torch.zeros(1, 0, 48)}, "text embeddings"),
        ({"pooled_embeds": torch.zeros(1, 25)}, "pooled"),
        ({"timesteps": torch.zeros(2)}, "timesteps"),
    ):
        with pytest.raises(UserError, match=words):
            model(**{**good, **change})


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("pro", 1514, 19_311_325_248), ("lite", 814, 2_007_702_848), ("image_lite", 1246, 6_022_080_576)],
)
def test_official_sizes_on_meta(name: str, tensors: int, parameters: int) -> None:
    """Names and shapes of the official state dicts (reference, section 1): nothing more, nothing less."""
    with torch.device("meta"):
        model = Kandinsky5Transformer(KNOWN_ARCHITECTURES[name])
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert len(state) == tensors
    assert sum(value.numel() for value in model.state_dict().values()) == parameters
    assert state == KNOWN_ARCHITECTURES[name].expected_tensors()
