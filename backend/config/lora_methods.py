"""Ways of changing a model other than a plain low-rank pair, known by their tensors' names; none is supported."""

from __future__ import annotations

from collections.abc import Iterable

# Parts of a key, and how parts of a key start, that belong to other methods than a plain low-rank pair.
_PARTS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoRA for convolutions",
    "diff": "a full weight difference",
    "diff_b": "a full weight difference",
}
_STARTS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_": "VeRA",
    "lora_embedding_": "LoRA for embeddings",
}


def other_method(keys: Iterable[str]) -> tuple[str, str] | None:
    """The method and the first key that belongs to it; None when there is none but plain LoRA among `keys`."""
    for key in keys:
        for part in key.split("."):
            method = _PARTS.get(part) or next((name for start, name in _STARTS.items() if part.startswith(start)), None)
            if method:
                return method, key
    return None


def refusal(method: str, key: str) -> str:
    """Why a file of another method is not taken, and what to do; continues "<file> is"."""
    return (
        f"{method} ({key[:200]}), which is not supported. Use a plain LoRA (lora_down / lora_up or lora_A / lora_B), "
        "or merge this one with the software that made it."
    )
