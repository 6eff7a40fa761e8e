"""What a model family is, as data: where a layer keeps its parts, and how they are put together.

A family file holds one `Arch` and imports nothing but this file. Paths are attribute paths from the layer, "self_attn.q_proj".
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from transformers.activations import ACT2FN

from ftops.block import BlockSpec, Freqs

__all__ = ["Arch", "Unfit", "follow", "replace"]

# transformers' names of the activations that the ops have.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "quick_gelu": "quick_gelu"}


class Unfit(Exception):
    """A layer that its family's description does not cover; the message says why, and the layer is kept."""


def follow(root: Any, path: str) -> Any:
    """The attribute of `root` at `path`. Raises Unfit if there is none."""
    try:
        return reduce(getattr, path.split("."), root)
    except AttributeError:
        raise Unfit(f"it has no {path}") from None


def activation_kind(module: object) -> str:
    """What the ops call the activation that `module` computes. Raises Unfit."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is type(ACT2FN[name]):
            return kind
    raise Unfit(f"activation {type(module).__name__} is not served")


@dataclass(frozen=True)
class Arch:
    """A family. `layer` is the class name of its layer in `transformers.models.<name>.modeling_<name>`."""

    name: str
    layer: str
    attention: str
    norms: tuple[str, ...]
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    activation: str
    qk_norms: tuple[str, str] | None = None
    order: Literal["pre", "post", "parallel"] = "pre"
    norm: Literal["rms", "layer"] = "rms"
    dropouts: tuple[str, ...] = ()
    window: str | None = None
    rotary: Literal["half", "interleaved"] | None = None
    rotary_dim: str | None = None
    # A table of sines, then cosines, that position_ids index; without one the layer is given (cos, sin) as position_embeddings.
    rotary_table: str | None = None
    cache: str = "past_key_values"
    returns_tuple: bool = False
    # Of an encoder: the class of the module that calls its layers one after the other, and where that keeps them.
    stack: tuple[str, str] | None = None
    # Its attention goes through transformers' attention registry; otherwise it adds the mask it is given to the scores.
    uses_registry: bool = True
    # Options of the configuration that change what the layer computes in a way the block has no word for.
    refuse: tuple[str, ...] = ()

    def matches(self, layer: torch.nn.Module) -> bool:
        """Exactly this class, not one that derives from it: a subclass may compute something else."""
        return self._is(layer, self.layer)

    def matches_stack(self, module: torch.nn.Module) -> bool:
        """Whether it is what calls layers of this family, as `stack` says."""
        return self.stack is not None and self._is(module, self.stack[0])

    def _is(self, module: torch.nn.Module, name: str) -> bool:
        kind = type(module)
        return kind.__name__ == name and kind.__module__ == f"transformers.models.{self.name}.modeling_{self.name}"

    def spec(self, layer: torch.nn.Module) -> BlockSpec:
        """The block that computes what `layer` does. Raises Unfit."""
        attention = follow(layer, self.attention)
        config = attention.config
        for option in self.refuse:
            if getattr(config, option, False):
                raise Unfit(f"{option}={getattr(config, option)} is not served")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if head_dim > 256:
            raise Unfit(f"head_dim {head_dim} is not served; up to 256 is")
        window = follow(layer, self.window) if self.window else None
        rotary_dim = follow(layer, self.rotary_dim) if self.rotary_dim else head_dim
        if rotary_dim is None:
            raise Unfit("rotary_dim=None is not served")
        eps = {_eps(follow(layer, path)) for path in (*self.norms, *(self.qk_norms or ()))}
        if len(eps) > 1:
            raise Unfit(f"its norms have different eps: {sorted(eps)}")
        return BlockSpec(
            heads=heads, kv_heads=getattr(config, "num_key_value_heads", None) or heads, head_dim=head_dim,
            order=self.order, norm=self.norm, eps=eps.pop(),
            activation=activation_kind(follow(layer, self.activation)), gated=len(self.up) == 2,
            scale=getattr(attention, "scaling", head_dim ** -0.5), causal=attention.is_causal and getattr(config, "is_causal", True),
            # transformers counts the token itself
            window=None if window is None else window - 1,
            rotary=self.rotary, rotary_dim=rotary_dim)

    def dropout(self, layer: torch.nn.Module) -> float:
        """The largest dropout probability that training mode would apply."""
        config = follow(layer, self.attention).config
        return max((getattr(config, name) for name in self.dropouts), default=0.0)

    def rotation(self, layer: torch.nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor | None, Freqs | None]:
        """positions and freqs for `ops.rotary`, from the arguments of the layer's forward."""
        if self.rotary is None:
            return None, None
        if self.rotary_table is None:
            return None, given["position_embeddings"]
        sin, cos = follow(layer, self.rotary_table).chunk(2, -1)
        return given["position_ids"].expand(given["hidden_states"].shape[:2]), (cos, sin)


def _eps(norm: torch.nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else follow(norm, "eps")
