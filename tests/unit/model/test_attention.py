"""Attention backends: one call signature, refusals that say what to do, and libraries through stand-in modules."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from backend.errors import UserError
from backend.model import attention
from backend.model.attention import AttentionBackend, available_backends, resolve_attention

LIBRARIES = {
    "flash3": "flash_attn_interface",
    "flash_attn": "flash_attn",
    "sage_attn": "sageattention",
    "xformers": "xformers",
}
GPU = torch.device("meta")


def _tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, size, 3, 8, generator=generator) for size in (5, 7, 7))


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    weights = torch.softmax(torch.einsum("bshd,bkhd->bhsk", query, key) / 8**0.5, dim=-1)
    return torch.einsum("bhsk,bkhd->bshd", weights, value)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four libraries as stand-in modules with the real names of their functions."""
    modules = {
        "flash_attn_interface": {"flash_attn_func": lambda *a, **k: (_plain(*a), None)},
        "flash_attn": {"flash_attn_func": _plain},
        "sageattention": {"sageattn": _plain},
        "xformers": {"__path__": []},
        "xformers.ops": {"memory_efficient_attention": _plain},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for key, value in members.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(attention, "compute_capability", lambda device: capability)


def test_sdpa_is_always_there_and_the_default_on_a_cpu() -> None:
    """Default, "auto" and by name."""
    assert available_backends()[0] == "sdpa"
    for name in (None, "auto", "sdpa"):
        assert resolve_attention(name).name == "sdpa"
    query, key, value = _tensors()
    assert torch.allclose(resolve_attention()(query, key, value), _plain(query, key, value), atol=1e-6)


def test_masks_equal_cutting_the_keys() -> None:
    """A key mask, a dense mask, and both together."""
    query, key, value = _tensors(1)
    keys = torch.arange(7)[None] < torch.tensor([[4], [7]])
    dense = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(2)) > 0.3
    dense[..., 0] = True
    backend = AttentionBackend("sdpa")
    masked = backend(query, key, value, key_mask=keys)
    assert torch.allclose(masked[0], _plain(query[:1], key[:1, :4], value[:1, :4])[0], atol=1e-6)
    assert torch.allclose(masked[1], _plain(query[1:], key[1:], value[1:])[0], atol=1e-6)
    heads = [part.transpose(1, 2) for part in (query, key, value)]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=dense & keys[:, None, None]).transpose(1, 2)
    assert torch.allclose(backend(query, key, value, key_mask=keys, mask=dense), expected, atol=1e-6)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is imported for it."""
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    monkeypatch.setattr(attention, "_installed", lambda library: False)
    assert available_backends() == ["sdpa"]
    with pytest.raises(UserError, match=f"{name} is not installed.*sdpa") as caught:
        resolve_attention(name, device=GPU, dtype=torch.bfloat16)
    assert caught.value.field == "attention"


def test_unknown_names_list_the_known_ones() -> None:
    """One sentence."""
    with pytest.raises(UserError, match="sdpa, flash3, flash_attn, sage_attn, xformers"):
        resolve_attention("flash9")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_a_library_cannot_serve_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU, float32 and old cards, each with its reason."""
    assert name in available_backends()
    with pytest.raises(UserError, match="NVIDIA GPU, but the device is cpu"):
        resolve_attention(name, device=torch.device("cpu"), dtype=torch.bfloat16)
    _pretend_gpu(monkeypatch, (6, 1))
    with pytest.raises(UserError, match="compute capability"):
        resolve_attention(name, device=GPU, dtype=torch.bfloat16)
    _pretend_gpu(monkeypatch, (9, 0))
    if name == "xformers":
        assert resolve_attention(name, device=GPU, dtype=torch.float32).name == name
    else:
        with pytest.raises(UserError, match="bfloat16 and float16 only"):
            resolve_attention(name, device=GPU, dtype=torch.float32)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_share_one_signature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same result as SDPA; calls with a mask go to SDPA; only SageAttention refuses to train."""
    _pretend_gpu(monkeypatch, (9, 0))
    backend = resolve_attention(name, device=GPU, dtype=torch.bfloat16)
    query, key, value = _tensors(3)
    assert torch.allclose(backend(query, key, value), AttentionBackend("sdpa")(query, key, value), atol=1e-6)
    keys = torch.arange(7)[None].expand(2, 7) < 3
    expected = AttentionBackend("sdpa")(query, key[:, :3], value[:, :3])
    assert torch.allclose(backend(query, key, value, key_mask=keys), expected, atol=1e-6)
    query.requires_grad_()
    if name == "sage_attn":
        with pytest.raises(UserError, match="cannot train"):
            backend(query, key, value)
    else:
        assert backend(query, key, value).requires_grad


@pytest.mark.usefixtures("libraries")
def test_the_best_that_serves_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 3 on Hopper, 2 on other cards, SDPA for float32; a broken installation is passed over."""
    for capability, expected in (((9, 0), "flash3"), ((8, 6), "flash_attn"), ((12, 0), "flash_attn"), ((7, 5), "sdpa")):
        _pretend_gpu(monkeypatch, capability)
        assert resolve_attention(device=GPU, dtype=torch.bfloat16).name == expected
        assert resolve_attention(device=GPU, dtype=torch.float32).name == "sdpa"
    _pretend_gpu(monkeypatch, (8, 6))
    monkeypatch.setattr(attention.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("abi")))
    assert resolve_attention(device=GPU, dtype=torch.bfloat16).name == "sdpa"
    with pytest.raises(UserError, match="does not import"):
        resolve_attention("flash_attn", device=GPU, dtype=torch.bfloat16)
