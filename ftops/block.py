"""The transformer block: one class, driven by data, for every decoder and encoder layer that ftops knows.

    pre        h = x + out(attend(qkv(norm1(x))))              y = h + mlp(norm2(h))
    post       h = norm1(x + out(attend(qkv(x))))              y = norm2(h + mlp(h))
    parallel   n = norm1(x)                                    y = out(attend(qkv(n))) + mlp(n) + x

    mlp(n) = down(act(gate(n)) * up(n)) if gated, else down(act(up(n)))

Each residual sum is one pass with the norm that follows it, or with the linear before it; q, k, v are one linear, and so are gate and up.
A pre-norm block hands its RMS norms to the linears behind them where that is faster.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ftops import ops
from ftops.ops.gated_activation import GLU
from ftops.quant import FORMATS, QuantizedWeight

# attend(q[B,S,H,D], k[B,S,Hkv,D], v) -> [B,S,H,D]: the caller's, because it knows where earlier keys are kept and what is hidden.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
GATED = {kind: gated for gated, kind in GLU.items()}
Freqs = tuple[torch.Tensor, torch.Tensor]
# From how many rows of x to how many a block's RMS norms are part of the linears behind them, by the format of the weights; of others
# never. One row, a step of Llama-3.1-8B on an H100: bfloat16 5.386 ms and 5.432 with norms of their own, int4 2.284 and 2.337, int8 3.318
# and 3.277. More than one, up to the 16 that can be, have not been timed. Rows that are rounded to eight bits are so in the pass of their
# norm, which then writes a byte a value where it wrote two and read them again.
NORMED_ROWS: dict[str | None, tuple[int, int]] = {None: (0, 1), "int4": (0, 1)} | {
    name: (ops.op_module(f"linear_{name}").MAX_ROWS + 1, 1 << 31) for name in ("fp8", "w8a8")}


@dataclass(frozen=True)
class Slots:
    """Where a decode step keeps keys and values, instead of Attend: k, v [B,S,Hkv,D] at fixed addresses.

    places[B,T] int32: the slots of the T new tokens. lengths[B] int32: how many are filled then. bias, page_table, with pages
    [P,page_size,Hkv,D] in place of rows, and the scales of an 8-bit cache as in `ops.decode_attention`.
    """

    k: torch.Tensor
    v: torch.Tensor
    places: torch.Tensor
    lengths: torch.Tensor
    bias: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockSpec:
    """What a block computes, sizes of its weights apart. `scale` and `window` (tokens to the left) are for whoever attends."""

    heads: int
    kv_heads: int
    head_dim: int
    order: Literal["pre", "post", "parallel"]
    norm: Literal["rms", "layer"]
    eps: float
    activation: str
    gated: bool
    scale: float
    causal: bool = True
    window: int | None = None
    rotary: Literal["half", "interleaved"] | None = None
    rotary_dim: int | None = None


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """weight [out, in], in any memory order, or quantised."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None

    @property
    def format(self) -> str | None:
        return self.weight.format if isinstance(self.weight, QuantizedWeight) else None

    def __call__(self, x: torch.Tensor, activation: str | None = None, residual: torch.Tensor | None = None,
                 norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
        linear = ops.linear if self.format is None else FORMATS[self.format].linear
        return linear(x, self.weight, self.bias, activation=activation, residual=residual, norm=norm, eps=eps)


@dataclass(frozen=True)
class BlockWeights:
    """qkv holds q, k, v one after the other; up holds gate, then up, if gated. norm2 is None in a parallel block."""

    norm1: Norm
    norm2: Norm | None
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Block:
    """One layer. Parameters are not registered here: they belong to whoever made the weights."""

    spec: BlockSpec
    weights: BlockWeights

    def __call__(self, x: torch.Tensor, attend: Attend | Slots, positions: torch.Tensor | None = None,
                 freqs: Freqs | None = None) -> torch.Tensor:
        """The layer's output [B,S,N] for x[B,S,N]; positions[B,S] and freqs as in `ops.rotary`. float32, float16 or bfloat16."""
        w = self.weights
        if self.spec.order == "post":
            h = self._norm_of_sum(w.norm1, self._attention(x, attend, positions, freqs), x)
            return self._norm_of_sum(w.norm2, self._mlp(h), h)
        if self.spec.order == "pre" and self.spec.norm == "rms" and self._norms_within(x):
            h = self._attention(x, attend, positions, freqs, residual=x, norm=w.norm1.weight)
            return self._mlp(h, residual=h, norm=w.norm2.weight)
        n = self._norm(w.norm1, x)
        if self.spec.order == "parallel":
            return self._mlp(n, residual=self._attention(n, attend, positions, freqs, residual=x))
        n, h = self._norm(w.norm2, self._attention(n, attend, positions, freqs), residual=x)
        return self._mlp(n, residual=h)

    def _norms_within(self, x: torch.Tensor) -> bool:
        least, most = NORMED_ROWS.get(self.weights.qkv.format, (1, 0))
        return least * x.shape[-1] <= x.numel() <= most * x.shape[-1]

    def _norm(self, norm: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.spec.norm == "rms":
            return ops.rms_norm(x, norm.weight, self.spec.eps, residual=residual)
        return ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps, residual=residual)

    def _norm_of_sum(self, norm: Norm, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.spec.norm == "rms":
            return self._norm(norm, x, residual)[0]
        return ops.layer_norm(x, norm.weight, norm.bias, self.spec.eps, residual=residual, return_sum=False)

    def _attention(self, x: torch.Tensor, attend: Attend | Slots, positions: torch.Tensor | None, freqs: Freqs | None,
                   residual: torch.Tensor | None = None, norm: torch.Tensor | None = None) -> torch.Tensor:
        spec, w = self.spec, self.weights
        # Not unflatten and Tensor.split, which are Python around the same two calls.
        heads = w.qkv(x, norm=norm, eps=spec.eps).view(*x.shape[:-1], -1, spec.head_dim)
        q, k, v = torch.split_with_sizes(heads, (spec.heads, spec.kv_heads, spec.kv_heads), -2)
        if isinstance(attend, Slots):
            return w.out(self._decode(q, k, v, attend, positions, freqs).flatten(-2), residual=residual)
        q, k = self._rotated(q, k, positions, freqs)
        return w.out(attend(q, k, v).flatten(-2), residual=residual)

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: Slots, positions: torch.Tensor | None,
                freqs: Freqs | None) -> torch.Tensor:
        """Attention of new tokens over all that is kept: norms, rotary and what is kept of k and v are one kernel."""
        spec, w = self.spec, self.weights
        kept = {"page_table": slots.page_table, "k_scale": slots.k_scale, "v_scale": slots.v_scale}
        if spec.rotary is not None and (w.q_norm is None or spec.norm == "rms"):
            q_norm, k_norm = (None if norm is None else norm.weight for norm in (w.q_norm, w.k_norm))
            q = ops.rotary_append(q, k, v, slots.k, slots.v, slots.places, freqs, rotary_positions=positions, q_norm=q_norm, k_norm=k_norm,
                                  eps=spec.eps, interleaved=spec.rotary == "interleaved", rotary_dim=spec.rotary_dim, **kept)
        else:
            q, k = self._rotated(q, k, positions, freqs)
            ops.append_kv(k, v, slots.k, slots.v, slots.places, **kept)
        return ops.decode_attention(q, slots.k, slots.v, slots.lengths, scale=spec.scale, window=spec.window, bias=slots.bias, **kept)

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None,
                 freqs: Freqs | None) -> tuple[torch.Tensor, torch.Tensor]:
        spec, w = self.spec, self.weights
        if w.q_norm is not None:
            q, k = self._norm(w.q_norm, q), self._norm(w.k_norm, k)
        if spec.rotary is not None:
            q, k = ops.rotary(q, k, positions, freqs, interleaved=spec.rotary == "interleaved", rotary_dim=spec.rotary_dim)
        return q, k

    def _mlp(self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: torch.Tensor | None = None) -> torch.Tensor:
        spec, w = self.spec, self.weights
        activation = GATED[spec.activation] if spec.gated else spec.activation
        return w.down(w.up(x, activation, norm=norm, eps=spec.eps), residual=residual)
