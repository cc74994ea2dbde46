"""A LoRA that is trained: gradients against the closed form, dropouts, starting from files, norms, choice of layers."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backend.config.checkpoint import KNOWN_ARCHITECTURES, identify
from backend.errors import Problems, UserError
from backend.lora.formats import LoraFormat, LoraWeights, write_lora
from backend.lora.modules import Dropouts, LoraBranch
from backend.lora.patterns import trainable_names
from backend.lora.targets import linear_targets
from backend.lora.trainable import TrainableLora, warm_start
from backend.model.quantize import Fp8Linear
from tests.unit.lora.models import TINY, block_layers, random_lora, skeleton

RANK = 3
ALPHA = 1.5
QUERY = "visual_transformer_blocks.1.self_attention.to_query"


def _attach(model: nn.Module, **more: object) -> TrainableLora:
    """A LoRA whose up matrices are random too: with zeros the gradient of down would be zero whatever one does."""
    lora = TrainableLora.attach(model, RANK, ALPHA, seed=5, **more)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in lora.named_parameters().items():
            if name.endswith(".up"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lora


def _layer(model: nn.Module, name: str = QUERY) -> nn.Module:
    return linear_targets(model)[name].layer


def _gradient(lora: TrainableLora) -> Tensor:
    gradient = lora.named_parameters()[f"{QUERY}.down"].grad
    assert gradient is not None
    return gradient


# --- what is made ------------------------------------------------------------------------------------------------


def test_a_new_lora_changes_nothing_and_is_drawn_as_kohya_draws_it() -> None:
    model, base = skeleton(), skeleton()
    lora = TrainableLora.attach(model, 4, None, seed=5)
    assert (lora.rank, lora.alpha, lora.strength) == (4, 4.0, 1.0)
    assert list(lora.layers) == trainable_names(linear_targets(base))
    x = torch.randn(2, 3, TINY.model_dim)
    assert torch.equal(_layer(model)(x), _layer(base)(x))
    parameters = lora.named_parameters()
    assert list(parameters) == [f"{name}.{half}" for name in lora.layers for half in ("down", "up")]
    assert all(one.dtype == torch.float32 and one.requires_grad for one in parameters.values())
    downs = torch.cat(
        [one.flatten() * one.shape[1] ** 0.5 for name, one in parameters.items() if name.endswith("down")]
    )
    # kaiming_uniform(a = sqrt 5) is uniform in +-1 / sqrt(in_features), whose standard deviation is that / sqrt 3.
    assert downs.abs().max() <= 1.0
    assert float(downs.detach().std()) == pytest.approx(1 / math.sqrt(3), rel=0.05)
    assert all((one == 0).all() for name, one in parameters.items() if name.endswith("up"))
    assert not any(one.requires_grad for name, one in model.named_parameters() if ".branches." not in name)


@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_no_alpha_means_the_rank(alpha: float | None) -> None:
    assert TrainableLora.attach(skeleton(), 6, alpha, seed=1).alpha == 6.0


def test_the_seed_decides_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = TrainableLora.attach(skeleton(), 4, 4, seed=9).weights()
    torch.manual_seed(2)
    model = skeleton()
    state = torch.get_rng_state()
    second = TrainableLora.attach(model, 4, 4, seed=9).weights()
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    other = TrainableLora.attach(skeleton(), 4, 4, seed=10).weights()
    assert all(torch.equal(first[name].down, second[name].down) for name in first)
    assert not torch.equal(first[QUERY].down, other[QUERY].down)


@pytest.mark.parametrize(("architecture", "count", "parameters"), [("pro", 624, 6_684_672), ("lite", 332, 1_555_456)])
def test_the_real_models_have_as_many_layers_as_published(architecture: str, count: int, parameters: int) -> None:
    """Counted from the names and shapes of the checkpoint alone: nothing of that size is built."""
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in KNOWN_ARCHITECTURES[architecture].expected_tensors().items()
        if name.endswith(".weight") and len(shape) == 2
    }
    names = trainable_names(matrices)
    assert len(names) == count
    assert sum(sum(matrices[name]) for name in names) == parameters
    assert names.index("visual_transformer_blocks.10.self_attention.to_key") > names.index(
        "visual_transformer_blocks.9.self_attention.to_key"
    )


# --- gradients ---------------------------------------------------------------------------------------------------


def _expected(weight: Tensor, bias: Tensor | None, lora: LoraWeights, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of x @ (W + alpha / rank * up @ down)^T + b in float64, W being one explicit matrix."""
    down, up = lora.down.double().requires_grad_(), lora.up.double().requires_grad_()
    x = x.detach().double().requires_grad_()
    merged = weight.double() + lora.alpha / lora.rank * (up @ down)
    loss = (nn.functional.linear(x, merged, None if bias is None else bias.double()) - target.double()).square().mean()
    loss.backward()
    assert down.grad is not None
    assert up.grad is not None
    assert x.grad is not None
    return {"loss": loss.detach(), "down": down.grad, "up": up.grad, "x": x.grad}


def _found(model: nn.Module, lora: TrainableLora, x: Tensor, target: Tensor, name: str) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = (_layer(model, name)(x).double() - target.double()).square().mean()
    loss.backward()
    gradients = {half: lora.named_parameters()[f"{name}.{half}"].grad for half in ("down", "up")}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach(), **{half: one.double() for half, one in gradients.items() if one is not None},
            "x": x.grad.double() if x.grad is not None else torch.zeros(())}  # fmt: skip


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [QUERY, "text_transformer_blocks.0.feed_forward.in_layer"])
@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "fp8"])
def test_gradients_equal_the_explicit_weight(kind: str, name: str) -> None:
    """Beside float64 to 1e-12, float32 to 1e-5. bfloat16 has 8 bits: every product rounds by up to 2^-9 = 0.2 %, and
    three of them follow each other, so 1 %. Beside 8-bit codes the closed form has the weight that they stand for, so
    only float32 rounding is left."""
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    model = skeleton(dtype=dtype)
    target_layer = linear_targets(model)[name]
    base = target_layer.layer
    assert isinstance(base, nn.Linear)
    weight, bias = base.weight.detach(), base.bias
    if kind == "fp8":
        base = Fp8Linear(base)
        setattr(target_layer.parent, target_layer.attribute, base)
        weight = base.codes.float() * base.scale
    lora = _attach(model)
    if kind == "float64":
        model.double()
    pair = lora.weights()[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 7, weight.shape[1], generator=generator).to(dtype)
    target = torch.randn(4, 7, weight.shape[0], generator=generator).to(dtype)
    expected = _expected(weight, bias, pair, x, target)
    found = _found(model, lora, x, target, name)
    limit = {"float64": 1e-12, "float32": 1e-5, "fp8": 1e-5, "bfloat16": 1e-2}[kind]
    errors = {part: _relative(found[part], expected[part]) for part in expected}
    assert max(errors.values()) < limit, errors
    if kind != "float64":
        parameters = lora.named_parameters()
        assert all(one.dtype == torch.float32 for one in parameters.values()), "the LoRA is not kept in float32"
        gradient = parameters[f"{name}.down"].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32


def test_an_update_smaller_than_bfloat16_can_hold_is_not_lost() -> None:
    """Why the parameters are float32 beside a bfloat16 base: 1 + 1e-4 is 1 in bfloat16."""
    model = skeleton(dtype=torch.bfloat16)
    lora = TrainableLora.attach(model, RANK, ALPHA, seed=5)
    parameter = lora.named_parameters()[f"{QUERY}.up"]
    with torch.no_grad():
        parameter.fill_(1.0)
        parameter.add_(1e-4)
    assert float(lora.weights()[QUERY].up[0, 0]) == pytest.approx(1.0001, abs=1e-6)


# --- dropouts ----------------------------------------------------------------------------------------------------


def _branch(dropouts: Dropouts | None, rank: int = 64) -> LoraBranch:
    """down passes on the ranks, up adds them one by one to as many outputs: the output shows what was dropped."""
    return LoraBranch(torch.eye(rank), torch.eye(rank), float(rank), dropouts=dropouts)


def _drop(dropouts: Dropouts, samples: int = 50, tokens: int = 6, rank: int = 64) -> Tensor:
    torch.manual_seed(11)
    x = torch.ones(samples, tokens, rank)
    return _branch(dropouts, rank).train().add_to(torch.zeros(samples, tokens, rank), x)


def test_dropout_drops_values_and_scales_the_others() -> None:
    out = _drop(Dropouts(hidden=0.25))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(out[:, 0], out[:, 1]), "each token has its own"


def test_rank_dropout_drops_ranks_of_whole_samples_and_scales_the_others() -> None:
    out = _drop(Dropouts(rank=0.5))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert float((out == 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(out, out[:, :1].expand_as(out)), "all tokens of a sample lose the same ranks"
    assert not torch.equal(out[0], out[1]), "each sample has its own"


def test_module_dropout_skips_whole_passes_and_scales_nothing() -> None:
    torch.manual_seed(12)
    branch = _branch(Dropouts(module=0.4)).train()
    x, output = torch.ones(2, 3, 64), torch.full((2, 3, 64), 5.0)
    results = [branch.add_to(output, x) for _ in range(400)]
    skipped = [torch.equal(result, output) for result in results]
    assert sum(skipped) / 400 == pytest.approx(0.4, abs=0.06)
    assert all(torch.equal(result, output + 1) for result, one in zip(results, skipped, strict=True) if not one)


def test_nothing_is_dropped_unless_training_is_on() -> None:
    model = skeleton()
    lora = _attach(model, dropout=0.5, rank_dropout=0.5, module_dropout=0.5)
    plain = skeleton()
    _attach(plain)
    x = torch.randn(2, 3, TINY.model_dim, generator=torch.Generator().manual_seed(1))
    expected = _layer(plain)(x)
    state = torch.get_rng_state()
    assert torch.equal(_layer(model)(x), expected), "dropouts are on before training(True)"
    lora.training(True)
    assert not all(torch.equal(_layer(model)(x), expected) for _ in range(20))
    lora.training(False)
    torch.set_rng_state(state)
    assert torch.equal(_layer(model)(x), expected)
    assert torch.equal(torch.get_rng_state(), state), "random numbers are drawn although nothing is dropped"
    lora.training(True)
    model.eval()
    assert torch.equal(_layer(model)(x), expected), "eval() of the model leaves dropouts on"


def test_dropouts_follow_the_global_seed_and_reach_the_gradients() -> None:
    gradients = []
    for _ in range(2):
        model = skeleton()
        lora = _attach(model, dropout=0.3, rank_dropout=0.3)
        lora.training(True)
        torch.manual_seed(77)
        _layer(model)(torch.ones(2, 3, TINY.model_dim)).square().sum().backward()
        gradients.append(_gradient(lora))
    assert torch.equal(*gradients)
    without = skeleton()
    lora = _attach(without)
    _layer(without)(torch.ones(2, 3, TINY.model_dim)).square().sum().backward()
    assert not torch.allclose(gradients[0], _gradient(lora))


def test_a_skipped_module_gets_no_gradient() -> None:
    model = skeleton()
    lora = _attach(model, module_dropout=0.99)
    lora.training(True)
    torch.manual_seed(0)
    x = torch.ones(1, 2, TINY.model_dim, requires_grad=True)
    _layer(model)(x).sum().backward()
    assert lora.named_parameters()[f"{QUERY}.down"].grad is None
    assert x.grad is not None


# --- strength ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model, base = skeleton(dtype=dtype), skeleton(dtype=dtype)
    lora = _attach(model)
    x = torch.randn(2, 3, TINY.model_dim).to(dtype)
    assert not torch.equal(_layer(model)(x), _layer(base)(x))
    lora.strength = 0.0
    assert torch.equal(_layer(model)(x), _layer(base)(x))
    lora.strength = 0.5
    pair = lora.weights()[QUERY]
    if dtype == torch.float32:
        delta = x.double() @ (0.5 * ALPHA / RANK * pair.up.double() @ pair.down.double()).t()
        assert torch.allclose(_layer(model)(x).double(), _layer(base)(x).double() + delta, atol=1e-5)
    with pytest.raises(UserError):
        lora.strength = math.nan


# --- weights, files, warm start ----------------------------------------------------------------------------------


def test_weights_are_copies_and_load_back() -> None:
    lora, other = _attach(skeleton()), TrainableLora.attach(skeleton(), RANK, ALPHA, seed=8)
    weights = lora.weights()
    with torch.no_grad():
        lora.named_parameters()[f"{QUERY}.up"].add_(1.0)
    assert not torch.equal(weights[QUERY].up, lora.weights()[QUERY].up)
    other.load(weights)
    assert all(torch.equal(other.weights()[name].up, pair.up) for name, pair in weights.items())
    assert all(one.requires_grad for one in other.named_parameters().values())


@pytest.mark.parametrize("file_format", ["kohya", "diffusers", "comfyui"])
def test_warm_start_from_every_format(tmp_path: Path, file_format: LoraFormat) -> None:
    """Trap B13: a peer's --dim_from_weights ends in a TypeError."""
    model = skeleton()
    saved = random_lora(model, rank=4, alpha=2.0)
    write_lora(tmp_path / "a.safetensors", saved, file_format)
    rank, alpha, layers = warm_start(tmp_path / "a.safetensors")
    # A diffusers file has no alpha: there it is in `up`, and 2 / 4 is a power of two.
    assert (rank, alpha) == (4, 4.0 if file_format == "diffusers" else 2.0)
    lora = TrainableLora.attach(model, rank, alpha, seed=1)
    lora.load(layers, source="a.safetensors")
    loaded = lora.weights()
    for name, pair in saved.items():
        assert torch.equal(loaded[name].down, pair.down)
        assert torch.equal(loaded[name].up * (loaded[name].alpha / 4), pair.up * 0.5)


def test_a_file_of_half_precision_starts_in_float32(tmp_path: Path) -> None:
    model = skeleton()
    write_lora(tmp_path / "a.safetensors", random_lora(model, rank=4, alpha=4.0, dtype=torch.bfloat16))
    rank, alpha, layers = warm_start(tmp_path / "a.safetensors")
    lora = TrainableLora.attach(model, rank, alpha, seed=1)
    lora.load(layers)
    assert {one.dtype for one in lora.named_parameters().values()} == {torch.float32}


def test_an_alpha_that_a_file_rounds_is_the_same_alpha(tmp_path: Path) -> None:
    """0.7 is stored as 0.699999988; training goes on with 0.7."""
    model = skeleton()
    write_lora(tmp_path / "a.safetensors", random_lora(model, rank=4, alpha=0.7))
    lora = TrainableLora.attach(model, 4, 0.7, seed=1)
    lora.load(warm_start(tmp_path / "a.safetensors").layers)
    assert lora.alpha == 0.7


def _refused(lora: TrainableLora, layers: dict[str, LoraWeights], **more: str) -> str:
    before = {name: one.detach().clone() for name, one in lora.named_parameters().items()}
    with pytest.raises(UserError) as caught:
        lora.load(layers, source="some.safetensors", **more)
    assert caught.value.field == more.get("field", "network_weights")
    after = lora.named_parameters()
    assert all(torch.equal(one, after[name]) for name, one in before.items()), "half loaded"
    return caught.value.message


def test_loading_is_strict() -> None:
    model = skeleton()
    lora = TrainableLora.attach(model, 4, 2.0, seed=1)
    whole = random_lora(model, rank=4, alpha=2.0)
    missing = dict(list(whole.items())[:-2])
    assert "no weights for 2 of the 32 layers" in _refused(lora, missing)
    assert "match no layer" in _refused(lora, {**whole, "out_layer.out_layer": whole[QUERY]})
    message = _refused(lora, random_lora(model, rank=8, alpha=2.0))
    assert "rank 8 and alpha 2" in message
    assert "--dim_from_weights" in message
    assert "--network_dim 4 --network_alpha 1" in _refused(lora, random_lora(model, rank=4, alpha=1.0), field="resume")
    wide = {**whole, QUERY: LoraWeights(torch.zeros(4, 16), torch.zeros(24, 4), 2.0)}
    assert "does not fit" in _refused(lora, wide)
    lora.load(whole)


def test_layers_of_different_ranks_cannot_be_started_from(tmp_path: Path) -> None:
    model = skeleton()
    layers = random_lora(model, rank=4, alpha=4.0)
    layers |= random_lora(model, [QUERY], rank=2, alpha=2.0)
    write_lora(tmp_path / "a.safetensors", layers)
    with pytest.raises(UserError, match="different rank or alpha") as caught:
        warm_start(tmp_path / "a.safetensors")
    assert caught.value.field == "network_weights"
    assert "rank 2, alpha 2" in caught.value.message


@pytest.mark.parametrize(
    ("key", "method"),
    [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("oft_blocks", "OFT")],
)
def test_other_methods_are_refused_with_the_reason(tmp_path: Path, key: str, method: str) -> None:
    from safetensors.torch import save_file

    stem = "lora_unet_visual_transformer_blocks_0_self_attention_to_query"
    save_file({f"{stem}.{key}": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        warm_start(tmp_path / "a.safetensors")
    assert caught.value.field == "network_weights"
    assert f"is {method}" in caught.value.message
    assert "not supported" in caught.value.message
    # The checks before any weight is loaded say the same, of the header alone.
    assert f"is {method}" in (identify(tmp_path / "a.safetensors").unsupported or "")


# --- norms, groups ------------------------------------------------------------------------------------------------


def _norms(lora: TrainableLora) -> dict[str, float]:
    return {
        name: float((pair.alpha / pair.rank * pair.up.double() @ pair.down.double()).norm())
        for name, pair in lora.weights().items()
    }


def test_norms_are_scaled_as_kohya_does() -> None:
    lora = _attach(skeleton())
    before, weights = _norms(lora), lora.weights()
    limit = sorted(before.values())[len(before) // 2] * 1.0001
    report = lora.scale_norms(limit)
    over = {name for name, norm in before.items() if norm > limit}
    assert 0 < len(over) < len(before)
    assert report.scaled == len(over)
    after = _norms(lora)
    for name, pair in lora.weights().items():
        factor = math.sqrt(limit / before[name]) if name in over else 1.0
        assert torch.allclose(pair.up, weights[name].up * factor, rtol=1e-6)
        assert torch.allclose(pair.down, weights[name].down * factor, rtol=1e-6)
        assert after[name] == pytest.approx(min(before[name], limit), rel=1e-6)
        assert name in over or torch.equal(pair.up, weights[name].up), "a layer below the limit was touched"
    assert report.mean == pytest.approx(sum(after.values()) / len(after), rel=1e-6)
    assert report.largest == pytest.approx(max(after.values()), rel=1e-6)
    assert all(one.requires_grad and one.grad is None for one in lora.named_parameters().values())


def test_norms_of_a_new_lora_are_zero() -> None:
    assert TrainableLora.attach(skeleton(), 2, 2, seed=1).scale_norms(1.0) == (0, 0.0, 0.0)


def test_lora_plus_gives_up_its_own_rate() -> None:
    lora = _attach(skeleton())
    parameters = lora.named_parameters()
    (only,) = lora.param_groups(1e-3)
    assert only["lr"] == 1e-3
    assert [id(one) for one in only["params"]] == [id(one) for one in parameters.values()]
    down, up = lora.param_groups(1e-3, 4.0)
    assert (down["lr"], up["lr"]) == (1e-3, 4e-3)
    for group, half in ((down, "down"), (up, "up")):
        assert [id(one) for one in group["params"]] == [id(one) for n, one in parameters.items() if n.endswith(half)]


def test_summary_lists_the_layers_when_asked() -> None:
    lora = _attach(skeleton(), include=[".*to_query"])
    assert lora.summary() == "LoRA: rank 3, alpha 1.5, 6 layers, 576 parameters"
    assert f"\n  {QUERY}: 16 -> 16" in lora.summary(verbose=True)


# --- which layers -------------------------------------------------------------------------------------------------


def _chosen(**patterns: list[str]) -> set[str]:
    return set(TrainableLora.attach(skeleton(), 2, 2, seed=1, **patterns).layers)  # type: ignore[arg-type]


def test_include_restricts_and_exclude_excludes() -> None:
    """Traps T14 and B12: with a peer, include never restricts and exclude never excludes."""
    everything = set(block_layers(skeleton()))
    cross = {name for name in everything if "cross_attention" in name}
    feed = {name for name in everything if "feed_forward" in name}
    first = {name for name in everything if ".0." in name}
    assert _chosen() == everything
    assert _chosen(include=[r".*cross_attention.*"]) == cross
    assert _chosen(exclude=[r".*feed_forward.*"]) == everything - feed
    assert _chosen(include=[r".*cross_attention.*", r".*feed_forward.*"]) == cross | feed
    assert _chosen(include=[r".*feed_forward.*"], exclude=[r".*blocks\.0\..*"]) == feed - first
    # A peer matches parts of names here, so "feed_forward" alone would be ambiguous: patterns are for whole names.
    assert _chosen(include=[r"visual_transformer_blocks\.1\.self_attention\.to_query"]) == {QUERY}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"include": ["feed_forward"]}, "include_patterns: 'feed_forward' matches none of the 32 layers"),
        ({"exclude": ["feed_forward"]}, "exclude_patterns: 'feed_forward' matches none"),
        ({"include": [".*modulation.*"]}, "modulation layers are never trained"),
        ({"include": [".*", "visual_transformer_blocks.9.*"]}, "'visual_transformer_blocks.9.*'"),
        ({"exclude": ["("]}, "no regular expression"),
        ({"exclude": [".*"]}, "leave no layer"),
    ],
)
def test_patterns_that_mean_nothing_are_problems(patterns: dict[str, list[str]], words: str) -> None:
    with pytest.raises(Problems) as caught:
        _chosen(**patterns)
    assert [problem.field for problem in caught.value.problems] == ["network_args"]
    assert words in str(caught.value)


def test_a_wrong_pattern_leaves_the_model_as_it_was() -> None:
    model = skeleton()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Problems):
        TrainableLora.attach(model, 2, 2, seed=1, include=["nothing"])
    assert model.state_dict().keys() == before.keys()
