"""ftops: `model = ftops.patch(model)` swaps a Hugging Face model's layers for fused ones.

Importing this module needs no GPU, no Numba and no transformers; it registers the ops with PyTorch and nothing else.
"""
from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# In a source checkout that is not installed, numba_kernels/ and integrations/ lie beside ftops/ instead of inside it.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "numba_kernels").exists() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

from ftops import ops, quant
from ftops.report import Report

if TYPE_CHECKING:
    import torch

    from ftops.generation import Generated, Stream

__version__ = "0.1.0"
__all__ = ["Engine", "QuantConfig", "Report", "__version__", "conversation",
           "generate", "load", "ops", "patch", "quant", "quantize", "report", "save", "stream", "unpatch", "warmup"]


def __getattr__(name: str) -> Any:
    # Classes that know transformers, which is imported when they are asked for.
    if name == "QuantConfig":
        from ftops.integrations.transformers.quantizer import QuantConfig
        return QuantConfig
    if name == "Engine":
        from ftops.integrations.transformers.engine import Engine
        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch(model: torch.nn.Module, *, quant: str | Any = None, kv_cache: str | None = None,
          tp: int | None = None, pp: int | None = None) -> torch.nn.Module:
    """Swaps the layers of a Hugging Face model for fused ones, in place, and returns the same object.

    Parameters are shared, not copied; `state_dict()` keeps its keys and values. Families without a description get their
    norms and attention swapped. quant: first, what `ftops.quantize` does. kv_cache: "int8" or "fp8", in which a decoder's keys and values
    are kept while it generates. `ftops.report(model)` says what was done, and `ftops.unpatch(model)` undoes it.
    Raises TypeError or ValueError, before anything is changed, for an argument that cannot be served.
    """
    from ftops.integrations.transformers.patch import patch as implementation
    return implementation(model, quant=quant, kv_cache=kv_cache, tp=tp, pp=pp)


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Puts the original layers back: forward, state_dict and generate are exactly as before `patch`.

    Quantised linear layers stay so, since their weights were let go, and a warning says it; `model.dequantize()` makes plain ones of what
    the format kept.
    """
    from ftops.integrations.transformers.patch import unpatch as implementation
    return implementation(model)


def quantize(model: torch.nn.Module, quant: str | Any, *, calibration: Any = None, **options: Any) -> torch.nn.Module:
    """Quantises the linear layers of a model, patched or not, in place, lets their weights go and returns the same object.

    quant: "int4", "int8", "fp8", "w8a8", with `options` as of `ftops.QuantConfig`, or one of those. The output head and the embeddings stay
    as they are unless it says so. calibration, for w8a8: token ids [B,S], what a tokenizer gives, or several of them; layers are then
    smoothed by the largest activations met (SmoothQuant). Raises TypeError or ValueError before anything is changed.
    """
    from ftops.integrations.transformers.quantizer import quantize as implementation
    return implementation(model, quant, calibration, **options)


def save(model: torch.nn.Module, folder: str | _Path, *, tokenizer: Any = None, max_shard_size: str = "5GB") -> None:
    """Writes a quantised model, patched or not, as safetensors with config.json and its tokenizer beside them; the folder must be new.

    Either all of it is there afterwards or nothing. tokenizer: None takes the files of the folder that the model was loaded from.
    `from_pretrained` reads it as well, once `ftops.QuantConfig` was looked at. Raises TypeError or ValueError.
    """
    from ftops.integrations.transformers.storage import save as implementation
    implementation(model, folder, tokenizer, max_shard_size)


def load(folder: str | _Path, *, device: str | torch.device | None = None) -> torch.nn.Module:
    """The model that `ftops.save` wrote, not patched, on `device` (None: the GPU where there is one).

    A damaged, foreign or mismatched file is refused before anything of it is used. Raises ValueError.
    """
    from ftops.integrations.transformers.storage import load as implementation
    return implementation(folder, device)


def report(model: torch.nn.Module) -> Report:
    """What `patch` did to each module of `model`, what was kept and why, and how often a layer fell back to its original."""
    from ftops.integrations.transformers.report import report as implementation
    return implementation(model)


def generate(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
             **options: Any) -> torch.Tensor | Generated:
    """Continues input_ids[B,S] (attention_mask[B,S]: 0 for padding, on the left) with a patched decoder: int64 [B, S + N].

    Options are those of `ftops.generation.Options`: max_new_tokens, temperature (0, the default, is greedy), top_k, top_p, min_p,
    penalties, bad_words, stop, eos_token_id, seed, ...; numbers may be tensors of one a row. return_logprobs=True, return_logits=True or
    return_hidden_states=True (of the context, [B,S,hidden]): a `ftops.generation.Generated` that has these too.
    draft_model: a smaller patched decoder of the same vocabulary, which writes num_draft_tokens (5) ahead of what the model then checks in
    one step; the tokens stay what they are. num_beams, with num_return_sequences, length_penalty, early_stopping and beam_diversity_rate:
    the best sequences of a beam search, [B num_return_sequences, S + N]. progress=True: a bar on standard error, if that is a terminal.
    On a GPU a decode step is the replay of one CUDA graph, captured at the second token of the first call of its kind and kept with its
    cache for the next call. Raises TypeError or ValueError.
    """
    from ftops.integrations.transformers.generate import generate as implementation
    return implementation(model, input_ids, attention_mask, **options)


def stream(model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Stream:
    """`generate` as an iterator of the tokens of each step, int64 [B]; it has `cancel`, `text(tokenizer)` and `result`.

    Options are those of `generate`, but for beams, drafts, prompt lookup and progress. Raises TypeError or ValueError.
    """
    from ftops.integrations.transformers.generate import stream as implementation
    return implementation(model, input_ids, attention_mask, **options)


def conversation(model: torch.nn.Module, batch: int = 1, capacity: int | None = None) -> Any:
    """A talk with a patched decoder, in turns, whose cache is kept: `chat.generate(new_ids, **options)` and `chat.stream` read what is new
    alone and answer as `generate` would answer all of it, with the options of `stream`; `chat.rewind(length)` forgets.

    batch: rows, which take their turns together. capacity: tokens a row, prompts and answers (None: what the model allows, 4096 at most),
    for which memory is taken at the first turn. Raises ValueError.
    """
    from ftops.integrations.transformers.conversation import Conversation
    return Conversation(model, batch, capacity)


def warmup(model: torch.nn.Module, **options: Any) -> None:
    """Compiles ahead of use every kernel that the patched `model` needs, with a progress bar.

    batch_sizes: (1,) unless given. max_length: tokens of the prompt that is run, 512 or what the model allows unless given. Raises
    TypeError or ValueError.
    """
    from ftops.integrations.transformers.warmup import warmup as implementation
    implementation(model, **options)
