"""The DiT in training: frozen, prepared in the right order, the same numbers with every way to save memory.

`meta` stands for a device that is not the CPU: torch refuses to mix it with tensors of the CPU, as it does for a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.config.tasks import TASKS, WeightPaths
from backend.config.train import TrainOptions
from backend.errors import UserError
from backend.lora.formats import write_lora
from backend.model import checkpointing, layers
from backend.model.attention import AttentionBackend
from backend.model.nabla import BLOCK_TOKENS, NablaConfig, nabla_mask
from backend.model.offload import SwappedLinear
from backend.model.quantize import Fp8Linear
from backend.training.inputs import ModelInputs
from backend.training.transformer import TrainingTransformer, nabla_config
from tests.unit.lora.models import random_lora
from tests.unit.model.helpers import SMALL_HEADS, build, random_weights, write_sharded
from tests.unit.model.trained import add_lora, same, switch_dropout

CPU = torch.device("cpu")
META = torch.device("meta")
SDPA = AttentionBackend("sdpa")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A diffusers folder with the tiny random model."""
    folder = tmp_path_factory.mktemp("weights") / "transformer"
    write_sharded(folder, random_weights(SMALL_HEADS), SMALL_HEADS)
    return str(folder)


def _load(weights: str, device: torch.device = CPU, attention: AttentionBackend = SDPA, **named: Any):
    options = TrainOptions(task="k5-demo-t2v", **named)
    return TrainingTransformer(options, WeightPaths(weights, None, None, None), device, torch.float32, attention)


def _inputs(batch: int = 2, size: tuple[int, int, int] = (2, 4, 4), seed: int = 3) -> ModelInputs:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(5)[None] < torch.tensor([5, 3, 4][:batch])[:, None]
    sigmas = torch.rand(batch, generator=generator)
    return ModelInputs(
        hidden_states=noise(batch, *size, SMALL_HEADS.in_channels),
        text=noise(batch, 5, SMALL_HEADS.in_text_dim),
        text_mask=mask if batch > 1 else None,
        pooled=noise(batch, SMALL_HEADS.in_text_dim2),
        timesteps=1000 * sigmas,
        sigmas=sigmas,
        target=noise(batch, *size, 16),
        loss_mask=torch.ones(batch, size[0], dtype=torch.bool),
        weights=torch.ones(batch),
    )


def _train(
    transformer: TrainingTransformer, parameters: dict[str, nn.Parameter], inputs: ModelInputs
) -> dict[str, Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(9)
    (transformer(inputs) - inputs.target).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    return {name: gradient.clone() for name, gradient in grads.items() if gradient is not None}


def _with_lora(transformer: TrainingTransformer) -> dict[str, nn.Parameter]:
    parameters = add_lora(transformer.model)
    switch_dropout(transformer.model, True)
    return parameters


# --- what learns --------------------------------------------------------------------------------------------------


def test_only_the_lora_learns(weights: str) -> None:
    transformer = _load(weights)
    assert not any(parameter.requires_grad for parameter in transformer.model.parameters())
    parameters = _with_lora(transformer)
    frozen = {name: p.detach().clone() for name, p in transformer.model.named_parameters() if name not in parameters}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1)
    found = _train(transformer, parameters, _inputs())
    assert found.keys() == parameters.keys()
    optimizer.step()
    after = dict(transformer.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(after[name].grad is None for name in frozen)
    assert not torch.equal(transformer(_inputs()), build(SMALL_HEADS)(**_arguments(_inputs())))


def _arguments(inputs: ModelInputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.hidden_states,
        "text_embeds": inputs.text,
        "pooled_embeds": inputs.pooled,
        "timesteps": inputs.timesteps,
        "text_mask": inputs.text_mask,
    }


def test_a_batch_of_different_texts_is_its_single_samples(weights: str) -> None:
    """Trap T4: a peer cannot batch captions of different lengths."""
    transformer, inputs = _load(weights), _inputs(3)
    velocity = transformer(inputs)
    assert (velocity.dtype, velocity.shape) == (torch.float32, (3, 2, 4, 4, 16))
    for index, length in enumerate((5, 3, 4)):
        one = {name: value[index : index + 1] for name, value in vars(inputs).items() if value is not None}
        single = replace(inputs, **one | {"text": one["text"][:, :length], "text_mask": None})
        torch.testing.assert_close(transformer(single)[0], velocity[index], rtol=1e-4, atol=1e-5)


def test_measuring_drops_nothing_and_leaves_the_switches_as_they_were(weights: str) -> None:
    transformer, inputs = _load(weights), _inputs()
    _with_lora(transformer)
    dropped = transformer(inputs)
    assert dropped.requires_grad
    first, second = transformer.predict_no_grad(inputs), transformer.predict_no_grad(inputs)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not torch.equal(dropped, first)
    assert not torch.equal(transformer(inputs), transformer(inputs))
    assert not transformer.model.training


def _flag(name: str) -> dict[str, Any]:
    return {name: 2 if name == "blocks_to_swap" else True}


# --- ways to save memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "gradient_checkpointing_cpu_offload", "blocks_to_swap"])
def test_on_a_cpu_every_way_gives_the_same_bits(weights: str, flag: str) -> None:
    plain = _load(weights)
    expected = _train(plain, _with_lora(plain), _inputs())
    transformer = _load(weights, **_flag(flag))
    assert same(_train(transformer, _with_lora(transformer), _inputs()), expected)
    told = [] if flag == "gradient_checkpointing" else [flag]
    assert [notice.field for notice in transformer.notices] == told
    assert all("CPU" in notice.message for notice in transformer.notices)


def test_checkpointing_is_on_when_it_is_asked_for(weights: str) -> None:
    """Trap T12: the offload flag alone turns checkpointing on."""
    assert _saved_bytes(_load(weights)) > 4 * _saved_bytes(_load(weights, gradient_checkpointing=True))
    assert _saved_bytes(_load(weights)) > 4 * _saved_bytes(_load(weights, gradient_checkpointing_cpu_offload=True))


def _saved_bytes(transformer: TrainingTransformer) -> int:
    add_lora(transformer.model)
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        transformer(_inputs())
    return total


@pytest.mark.parametrize("flag", ["fp8_base", "fp8_scaled"])
def test_eight_bit_training_has_gradients_close_to_the_whole_ones(weights: str, flag: str) -> None:
    plain, transformer = _load(weights), _load(weights, **_flag(flag))
    assert sum(isinstance(module, Fp8Linear) for module in transformer.model.modules()) == 26
    expected = _train(plain, _with_lora(plain), _inputs())
    found = _train(transformer, _with_lora(transformer), _inputs())
    one, other = (torch.cat([values[name].flatten() for name in sorted(values)]) for values in (found, expected))
    assert float(nn.functional.cosine_similarity(one, other, dim=0)) > 0.98


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_on_a_device_swapped_weights_stay_in_cpu_memory(
    weights: str, quantised: bool, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward run on the device alone: whatever had stayed behind on the CPU would be refused by torch."""
    stored: list[Tensor] = []

    def copy_out(tensor: Tensor) -> Tensor:  # A meta tensor has nothing to copy.
        assert tensor.device.type == "meta"
        stored.append(torch.zeros(tensor.shape, dtype=tensor.dtype))
        return stored[-1]

    monkeypatch.setattr(checkpointing, "copy_to_host", copy_out)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # It knows no meta device.
    transformer = _load(
        weights, META, blocks_to_swap=1, fp8_base=quantised, gradient_checkpointing_cpu_offload=checkpointed
    )
    assert transformer.notices == []
    swapped = [module for module in transformer.model.modules() if isinstance(module, SwappedLinear)]
    assert len(swapped) == 11
    masters = {master.device.type for module in swapped for master in module._masters}
    assert masters == {"cpu"}
    _with_lora(transformer)
    parameters = {name: p for name, p in transformer.model.named_parameters() if p.requires_grad}
    tensors = [*transformer.model.parameters(), *transformer.model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    found = _train(transformer, parameters, _inputs(1).to(META))
    assert found.keys() == parameters.keys()
    assert {gradient.device.type for gradient in found.values()} == {"meta"}
    assert len(stored) == (3 if checkpointed else 0)


def test_parking_keeps_the_parameters_that_the_optimizer_knows(weights: str) -> None:
    transformer = _load(weights, torch.device("cpu", 0))
    parameters = _with_lora(transformer)
    before, identities = _train(transformer, parameters, _inputs()), {n: id(p) for n, p in parameters.items()}
    transformer.to_cpu()
    transformer.to_device()
    again = {n: p for n, p in transformer.model.named_parameters() if p.requires_grad}
    assert {n: id(p) for n, p in again.items()} == identities
    assert same(_train(transformer, parameters, _inputs()), before)


# --- merged LoRAs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [True, False])
def test_base_weights_are_merged_before_the_model_is_quantised(weights: str, quantised: bool, tmp_path: Path) -> None:
    """Trap T8, B11: added to 8-bit codes, a LoRA is lost."""
    layers_of_lora = random_lora(build(SMALL_HEADS), seed=4)
    write_lora(tmp_path / "merged.safetensors", layers_of_lora)
    inputs = _inputs()
    base = _load(weights).predict_no_grad(inputs)
    given = {"base_weights": [str(tmp_path / "merged.safetensors")], "base_weights_multiplier": [1.0]}
    whole = _load(weights, **given).predict_no_grad(inputs) - base
    base = _load(weights, fp8_base=quantised).predict_no_grad(inputs)
    found = _load(weights, fp8_base=quantised, **given).predict_no_grad(inputs) - base
    assert float(whole.norm() / base.norm()) > 0.01
    assert float((found - whole).norm() / whole.norm()) < (0.6 if quantised else 1e-6)
    assert float(nn.functional.cosine_similarity(found.flatten(), whole.flatten(), dim=0)) > 0.8


def test_a_merged_file_that_does_not_fit_is_named_at_its_option(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _load(weights, base_weights=[str(tmp_path / "missing.safetensors")])
    assert caught.value.field == "base_weights"


# --- attention ----------------------------------------------------------------------------------------------------


def test_an_attention_without_gradients_is_refused(weights: str) -> None:
    """Trap T13: a peer lists sage_attn for training and fails in the first step."""
    sage = AttentionBackend("sage_attn", lambda query, key, value: query, trains=False)
    with pytest.raises(UserError, match="sage_attn has no gradients") as caught:
        _load(weights, attention=sage)
    assert caught.value.field == "attention"


def test_flags_of_nabla_fill_what_the_task_leaves_open() -> None:
    plain, sparse = TASKS["k5-pro-t2v-5s-sd"], TASKS["k5-pro-t2v-10s-hd"]
    assert nabla_config(TrainOptions(), plain) is None
    assert nabla_config(TrainOptions(), sparse) == NablaConfig(0.7)
    forced = TrainOptions(force_nabla_attention=True)
    assert nabla_config(forced, plain) == NablaConfig(0.9, 11, 3, 3, "topcdf", True)
    given = {"nabla_P": 0.5, "nabla_wT": 5, "nabla_wH": 1, "nabla_wW": 7, "nabla_method": "topk"}
    options = TrainOptions(force_nabla_attention=True, nabla_add_sta=False, **given)
    assert nabla_config(options, plain) == nabla_config(options, sparse) == NablaConfig(0.5, 5, 1, 7, "topk", False)


def test_sparse_training_has_the_gradients_of_masked_dense_attention(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap B15: a sparse mask that is not obeyed trains another function than inference computes."""
    given = {"force_nabla_attention": True, "nabla_P": 0.3, "nabla_wT": 1, "nabla_wH": 1, "nabla_wW": 1}
    transformer = _load(weights, **given)
    parameters, inputs = _with_lora(transformer), _inputs(2, (2, 16, 32))
    assert [notice.field for notice in transformer.notices] == ["attention"]
    found = _train(transformer, parameters, inputs)
    shares: list[float] = []

    def dense(query: Tensor, key: Tensor, value: Tensor, config: NablaConfig, window: Tensor) -> Tensor:
        heads_first = [part.transpose(1, 2) for part in (query, key, value)]
        mask = nabla_mask(heads_first[0].detach(), heads_first[1].detach(), config, window)
        shares.append(float(mask.float().mean()))
        tokens = mask.repeat_interleave(BLOCK_TOKENS, -1).repeat_interleave(BLOCK_TOKENS, -2)
        return nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=tokens).transpose(1, 2)

    monkeypatch.setattr(layers, "nabla_attention", dense)
    expected = _train(transformer, parameters, inputs)
    assert all(share < 0.7 for share in shares), shares
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_sizes_are_refused_before_training(weights: str) -> None:
    dense, sparse = _load(weights), _load(weights, force_nabla_attention=True)
    dense.check_size(30, 52)
    sparse.check_size(16, 32)
    with pytest.raises(UserError, match=r"NABLA attention needs .* 416 x 240 is not"):
        sparse.check_size(30, 52)
    with pytest.raises(UserError, match="416 x 248 pixels do not divide"):
        dense.check_size(31, 52)
