"""The two text encoders: Qwen2.5-VL's language model for every token, CLIP's text model for one pooled vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from backend.errors import EngineError, UserError
from backend.text.four_bit import make_four_bit
from backend.text.locate import EncoderFiles
from backend.text.templates import PromptTemplate
from backend.text.weights import StoredTensor, check_tensors, fill_module, list_tensors

CLIP_TOKENS = 77

# Names before the language model's own ones: published files, files saved by newer and by older transformers.
_QWEN_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_QWEN_UNUSED = ("visual.", "model.visual.", "lm_head.", "language_model.lm_head.")
_CLIP_UNUSED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


@dataclass(frozen=True)
class Tokens:
    """The token ids of one prompt in its template, and how many of the prompt's own tokens were cut off."""

    ids: tuple[int, ...]
    kept: int
    removed: int


class QwenEncoder:
    """The language model of Qwen2.5-VL as Kandinsky 5 uses it: last normed hidden state after the template's beginning.

    The vision tower is never built. The crop is the length of the template's beginning in this tokenizer; `warnings`
    says so when it is not the published one.
    """

    def __init__(
        self,
        files: EncoderFiles,
        template: PromptTemplate,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantised: bool = False,
    ) -> None:
        """Load the encoder: `dtype` float32 or bfloat16 for weights, arithmetic and result.

        With `quantised` the weights of its Linears are 4-bit numbers (nf4) and only the arithmetic is in `dtype`.

        Raises:
            UserError: tokenizer or weights are damaged, incomplete, or not of this kind of model; bitsandbytes is
                missing for `quantised`.
        """
        self.files = files
        self.field = files.kind.field
        self.tokenizer = load_tokenizer(files)
        self._use(template)
        self.model = _build_qwen(files, device, dtype, quantised)
        self.device = device
        _check_vocabulary(len(self.tokenizer), self.model.config.vocab_size, files)

    def with_template(self, template: PromptTemplate) -> QwenEncoder:
        """The same encoder for another template; both share the weights.

        Raises:
            UserError: the tokenizer does not know the template's end.
        """
        other = copy.copy(self)
        other._use(template)
        return other

    def _use(self, template: PromptTemplate) -> None:
        self.template = template
        self.warnings: list[str] = []
        self.prefix_ids = self._ids(template.prefix)
        self.suffix_ids = self._ids(template.suffix)
        self._check_template(self.files)

    @property
    def crop(self) -> int:
        """How many tokens at the beginning belong to the template and are cut off."""
        return len(self.prefix_ids)

    def tokenise(self, prompt: str, max_length: int) -> Tokens:
        """Token ids of the template around `prompt`, with at most `max_length` tokens after the crop.

        A longer prompt loses tokens of its own end; the end-of-turn token always stays.

        Raises:
            EngineError: the ids do not begin with those of the template (a tokenizer that behaves differently).
        """
        ids = self._ids(self.template.wrap(prompt))
        # A line break at the start of the prompt can join the template's last line break into one token. The crop
        # stays where it is then, as in the official code.
        same = self.crop - 1 if prompt[:1].isspace() else self.crop
        if ids[:same] != self.prefix_ids[:same] or ids[-len(self.suffix_ids) :] != self.suffix_ids:
            raise EngineError(
                f"The Qwen2.5-VL tokenizer does not keep the prompt template whole around {prompt[:60]!r}.", "text"
            )
        removed = max(0, len(ids) - self.crop - max_length)
        if removed:
            ids = ids[: self.crop + max_length - len(self.suffix_ids)] + self.suffix_ids
        return Tokens(tuple(ids), len(ids) - self.crop - len(self.suffix_ids), removed)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Tokens], batch_size: int = 1) -> Iterator[torch.Tensor]:
        """Yield one [S, D] tensor on the CPU for each of `prompts`, in order, padding never included.

        Batches are padded on the right, where causal attention cannot look, so no mask is needed. Results of one
        prompt in different batches agree to rounding only; a batch size of 1 makes them repeatable bit for bit.
        """
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            ids = torch.zeros(len(batch), max(len(tokens.ids) for tokens in batch), dtype=torch.long)
            for row, tokens in zip(ids, batch, strict=True):
                row[: len(tokens.ids)] = torch.tensor(tokens.ids)
            hidden = self.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
            for row, tokens in zip(hidden, batch, strict=True):
                yield row[self.crop : len(tokens.ids)].cpu().clone()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _check_template(self, files: EncoderFiles) -> None:
        if len(self.suffix_ids) != 1:
            raise UserError(
                f"The tokenizer in {files.tokenizer} does not know {self.template.suffix}, so it is not the one of "
                "Qwen2.5-VL. Use the tokenizer that came with the model.",
                files.kind.field,
            )
        if self.crop != self.template.crop:
            self.warnings.append(
                f"The {self.template.name} prompt template is {self.crop} tokens long in the tokenizer of "
                f"{files.tokenizer}, not {self.template.crop} as published. This is probably not the tokenizer that "
                "the model was trained with."
            )


class ClipEncoder:
    """CLIP's text model as Kandinsky 5 uses it: raw prompt, 77 tokens, vector at the end token, no projection.

    With a smaller `max_length` (start and end token included) it reads fewer tokens than the model was made for.
    """

    def __init__(self, files: EncoderFiles, *, device: torch.device, max_length: int = CLIP_TOKENS) -> None:
        """Load the encoder in float32, whatever format the files have; `max_length` is 3 to 77.

        Raises:
            UserError: tokenizer or weights are damaged, incomplete, or not of this kind of model.
        """
        self.max_length = max_length
        self.tokenizer = load_tokenizer(files)
        self.model = _build_clip(files, device)
        self.device = device
        _check_vocabulary(len(self.tokenizer), self.model.config.vocab_size, files)

    def removed(self, prompt: str) -> int:
        """How many of the prompt's tokens do not fit into those that CLIP reads."""
        return max(0, len(self.tokenizer(prompt, verbose=False)["input_ids"]) - self.max_length)

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """The pooled vector of `prompt`: float32 [D] on the CPU."""
        inputs = self.tokenizer(
            [prompt], padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        outputs = self.model(
            input_ids=inputs["input_ids"].to(self.device), attention_mask=inputs["attention_mask"].to(self.device)
        )
        return outputs.pooler_output[0].float().cpu().clone()


def load_tokenizer(files: EncoderFiles) -> Any:
    """Load a tokenizer from local files without running code from them; it pads on the right whatever they say.

    Raises:
        UserError: the files are damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(files.tokenizer), local_files_only=True, trust_remote_code=False, padding_side="right"
        )
    except Exception as error:  # whatever foreign files make of it, it is the files that are wrong
        raise UserError(
            f"The tokenizer in {files.tokenizer} cannot be loaded ({_first_line(error)}). Get it again.",
            files.kind.field,
        ) from error
    tokenizer.padding_side = "right"
    return tokenizer


def _build_qwen(files: EncoderFiles, device: torch.device, dtype: torch.dtype, quantised: bool) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    def text_config() -> Any:
        if files.config["model_type"] == "qwen2_5_vl_text":
            return Qwen2_5_VLTextConfig.from_dict(files.config)
        return Qwen2_5_VLConfig.from_dict(files.config).text_config

    tensors = list_tensors(files.weights, _qwen_name, files.kind.field)
    model = _empty_model(files, tensors, text_config, Qwen2_5_VLTextModel)
    _check(model, tensors, files)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # its tables are computed, not stored
    if quantised:
        make_four_bit(model, dtype, files.kind.label)
    return _finish(model, tensors, files, device, dtype)


def _build_clip(files: EncoderFiles, device: torch.device) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    def text_config() -> Any:
        config = files.config
        return CLIPTextConfig.from_dict(config["text_config"] if config["model_type"] == "clip" else config)

    tensors = list_tensors(files.weights, _clip_name, files.kind.field)
    model = _empty_model(files, tensors, text_config, CLIPTextModel)
    wrapper = "text_model."  # some versions of transformers have this level, others do not; files likewise
    if any(name.startswith(wrapper) for name in model.state_dict()):
        tensors = {wrapper + name: tensor for name, tensor in tensors.items()}
    _check(model, tensors, files)
    for module in model.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(model.config.max_position_embeddings).expand((1, -1))
    return _finish(model, tensors, files, device, torch.float32)


def _empty_model(
    files: EncoderFiles,
    tensors: dict[str, StoredTensor],
    text_config: Callable[[], Any],
    model_class: Callable[[Any], nn.Module],
) -> Any:
    """Build the model without memory; the number of layers is checked first, as a wrong one could take for ever."""
    inner = files.config.get("text_config")
    named = (inner if isinstance(inner, dict) else files.config).get("num_hidden_layers")
    stored = len({name.split("layers.", 1)[1].split(".")[0] for name in tensors if "layers." in name})
    try:
        if named is not None and named != stored:
            raise ValueError(f"it asks for {named} layers, the weights have {stored}")
        config = text_config()
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever a foreign config.json makes of it, it is the file that is wrong
        raise UserError(
            f"{files.model / 'config.json'} does not describe this {files.kind.label} model ({_first_line(error)}). "
            "Download the folder again.",
            files.kind.field,
        ) from error


def _check(model: nn.Module, tensors: dict[str, StoredTensor], files: EncoderFiles) -> None:
    what = f"the {files.kind.label} model that {files.model / 'config.json'} describes"
    check_tensors(model, tensors, what, files.kind.field)


def _finish(
    model: nn.Module, tensors: dict[str, StoredTensor], files: EncoderFiles, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    fill_module(model, tensors, device=device, dtype=dtype, field=files.kind.field)
    return model.to(device).eval()


def _qwen_name(name: str) -> str | None:
    if name.startswith(_QWEN_UNUSED):
        return None
    for prefix in _QWEN_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _clip_name(name: str) -> str | None:
    if name.startswith(_CLIP_UNUSED) or name.endswith("position_ids"):
        return None
    return name.removeprefix("text_model.")


def _check_vocabulary(tokens: int, rows: int, files: EncoderFiles) -> None:
    if tokens > rows:
        raise UserError(
            f"The tokenizer in {files.tokenizer} has {tokens} tokens, but the model in {files.model} knows {rows}. "
            "Use the tokenizer that came with the model.",
            files.kind.field,
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
