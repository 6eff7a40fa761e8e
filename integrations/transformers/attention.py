"""ftops in transformers' two registries: attention functions and the masks that are made for them.

"ftops_rows"  for models whose layers are fused: the mask says only which keys are padding, [B,1,1,KV], and costs one row;
              causality and window are the kernel's. Nothing but a fused layer may be given such a mask.
"ftops"       for every other model: transformers' own whole mask; the function serves it with `ops.attention` and hands what it
              cannot give (weights, gradients, dropout, sinks, position bias, ...) to transformers' own functions.
"""
from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import output_capturing

from ftops import ops
from ftops.integrations.transformers.cache import additive
from ftops.integrations.transformers.packing import attach
from ftops.op import DTYPES

WHOLE, ROWS = "ftops", "ftops_rows"
# A fused layer that falls back passes this, the implementation to use, with the whole mask that it made of the rows.
INSTEAD = "ftops_instead"
# Arguments that attention functions are passed and that change nothing here: the mask or the module has said it already.
SILENT = {"sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
          "is_causal", "num_items_in_batch", "token_type_ids", "position_embeddings", "past_key_values", "logits_to_keep", INSTEAD}


@dataclass
class AttentionState:
    """Of an attention module that calls the registry: what it used before, and how often that served a call since, by reason."""

    before: str
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a copy may be unpickled where nothing was patched yet
        self.__dict__.update(state)


def register() -> None:
    """Makes the names known to transformers; again is harmless."""
    AttentionInterface.register(WHOLE, whole_attention)
    AttentionInterface.register(ROWS, rows_attention)
    AttentionMaskInterface.register(WHOLE, sdpa_mask)
    AttentionMaskInterface.register(ROWS, rows_mask)


def weights_requested(given: dict[str, Any]) -> bool:
    """Whether the caller wants attention weights: by argument, or through transformers' output recorder."""
    return bool(given.get("output_attentions")) or "attentions" in recorded()


def recorded() -> Container[str]:
    """What transformers' output recorder is to keep of layers: attentions, hidden_states."""
    # Dynamo cannot trace a ContextVar; transformers itself uses the plain variable while compiling.
    recorder = output_capturing._active_collector
    return (recorder.global_var if torch.compiler.is_compiling() else recorder.get()) or ()


def rows_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
              attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, use_vmap: bool = False,
              dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor | None:
    """Which keys are padding, 0 and -inf [B,1,1,KV] in `dtype`; None if none is; the whole mask for patterns that are not plain.

    transformers marks packed sequences and the like by refusing the causal skip; it refuses it for one query as well, and always
    for masks in both directions, where it passes `allow_is_bidirectional_skip` instead. Those know which tokens are real (`packing`).
    """
    plain = "allow_is_bidirectional_skip" in kwargs or allow_is_causal_skip or q_length == 1
    if use_vmap or not plain:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                         attention_mask=attention_mask, allow_is_causal_skip=False, use_vmap=use_vmap, **kwargs)
    if attention_mask is None:
        return None
    if not _recording():
        seen = attention_mask[:, kv_offset:]
        if bool(seen.all() & (q_offset + q_length - kv_offset <= seen.shape[1])):
            return None
    missing = kv_offset + kv_length - attention_mask.shape[1]
    padding = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    mask = additive(padding[:, None, None, kv_offset : kv_offset + kv_length], dtype)
    if not _recording():
        if "allow_is_bidirectional_skip" not in kwargs:
            if isinstance(q_offset, int) and q_offset == kv_offset == 0 and 1 < q_length <= kv_length:  # a prompt, behind which is nothing
                attach(mask, padding[:, :q_length], prompt=True)
        elif q_length == kv_length:
            attach(mask, padding[:, kv_offset : kv_offset + kv_length])
    return mask


def _recording() -> bool:
    """While a graph is traced or captured, values on the device cannot be read."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def rows_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                   attention_mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the original layer of a fused one calls when that falls back: transformers' own attention with the whole mask."""
    instead = kwargs.pop(INSTEAD, None)
    if instead is None:
        raise RuntimeError(f'attn_implementation "{ROWS}" is for models patched by ftops.patch, and {type(module).__name__} is not in one; '
                           'set attn_implementation="sdpa"')
    return hand_over(instead, module, query, key, value, attention_mask, **kwargs)


def whole_attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                    softcap: float | None = None, position_bias: torch.Tensor | None = None,
                    **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function: query[B,H,S,D], key and value[B,Hkv,KV,D] -> ([B,S,H,D], weights or None)."""
    reason = _unfit(query, key, value, attention_mask, dropout, kwargs)
    if reason is not None:
        state: AttentionState | None = module.__dict__.get("_ftops_attention")
        if state is not None and not torch.compiler.is_compiling():
            state.fallbacks[reason] += 1
        return hand_over(state.before if state else "sdpa", module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                         **{name: given for name, given in (("softcap", softcap), ("position_bias", position_bias)) if given is not None},
                         **kwargs)
    length = query.shape[2]
    causal = attention_mask is None and length > 1 and bool(_causal(module, kwargs))
    if causal and key.shape[2] > length:
        # The one case in which transformers skips the mask over a longer buffer: the first tokens of a static cache.
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    bias = None if attention_mask is None else additive(attention_mask, query.dtype)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = ops.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal, scale=scaling,
                        softcap=softcap or 0.0, bias=bias)
    return out, None


def _causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _unfit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
           kwargs: dict[str, Any]) -> str | None:
    if weights_requested(kwargs):
        return "attention weights"
    if dropout:
        return "dropout"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients"
    for name, given in kwargs.items():
        if name not in SILENT and given is not None and given is not False:
            return f"argument {name}"
    if query.dtype not in DTYPES or key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if query.device.type not in ("cpu", "cuda"):
        return f"device {query.device.type}"
    if query.shape[-1] > 256 or value.shape[-1] != query.shape[-1] or query.shape[1] % key.shape[1]:
        return f"head dims {query.shape[-1]}, {value.shape[-1]} of {query.shape[1]}, {key.shape[1]} heads"
    if query.shape[0] != key.shape[0] or (mask is not None and mask.dim() != 4):
        return "shapes"
    return None


def hand_over(before: str, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              mask: torch.Tensor | None, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' SDPA function, or the eager one in the model's file: if the model used that, or for what only that can give."""
    eager: Callable | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    special = [name for name in kwargs if kwargs[name] is not None and name not in SILENT and name not in ("scaling", "dropout")]
    if eager is None or not (before == "eager" or special or weights_requested(kwargs)):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    length, keys = query.shape[2], key.shape[2]
    if mask is None and length > 1 and _causal(module, kwargs):
        mask = torch.ones((1, 1, length, keys), dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        # As transformers does: the smallest finite number, so that a row that sees nothing is no NaN.
        mask = additive(mask, query.dtype).clamp(min=torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **kwargs)
