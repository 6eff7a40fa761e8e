"""The layers of an encoder in one loop over their blocks: tokens are gathered and put back once, and transformers is not asked in between.

A forward of few tokens takes the host longer to launch than a GPU to compute (BERT-large on an H200: 6.7 ms for 1 x 128, where the GPU
needs 1.3). Such a forward is the replay of a CUDA graph from the third time on (1.5 ms on an H100, call and wait). Graphs are of so many
tokens, sequences and keys: how many tokens there are is rounded up, and zeros fill the room as a sequence of their own, so that no row is
undefined.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ftops import ops
from ftops.block import Block, BlockSpec
from ftops.generation.capture import Graphs
from ftops.integrations.transformers.arch import Arch
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.attention import recorded
from ftops.integrations.transformers.decoder import watched
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.packing import Packing, attend_packed, packing
from ftops.integrations.transformers.swap import Swapped, change_class, original_class, own_forward, swapped_class
from ftops.op import heard

# FLOP of a layer's linears from which on its launches, 0.28 ms, hide behind them: an H200 does these in 0.4 ms.
BUSY = 2e11
PLAIN = 2  # forwards before a graph
STEPS = 16  # sizes of graphs from one power of two to the next
TILE = 128  # tokens of the longest sequence are rounded up to so many, which is what attention computes with


class Stack:
    """What a swapped encoder knows: its family, and the graphs of its blocks with the tensors that they are of."""

    def __init__(self, arch: Arch) -> None:
        self.arch, self.disturbed, self._lock = arch, False, threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Lets go of the graphs and their memory."""
        self._blocks: tuple[Block, ...] = ()
        self._graphs = self._tokens = self._starts = self._stream = None

    def __getstate__(self) -> dict[str, Any]:
        return {"arch": self.arch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["arch"])

    def run(self, blocks: tuple[Block, ...], x: torch.Tensor, packed: Packing | None) -> torch.Tensor:
        """x[B,S,N] through the blocks; packed: on these tokens alone, 0 elsewhere."""
        count = x.shape[:2].numel() if packed is None else packed.tokens.numel()
        if 0 < count * _flops_a_token(blocks[0]) < BUSY and _capturable(x):
            with self._lock:
                self._prepare(blocks, x)
                return self._replayed(x, packed, count)
        if packed is None:
            return _through(blocks, x, _attend)
        return packed.spread(_through(blocks, packed.picked(x), partial(attend_packed, packed.cu_seqlens, packed.longest)))

    def _prepare(self, blocks: tuple[Block, ...], x: torch.Tensor) -> None:
        """For forwards by these blocks, on the current stream: behind the last one, wherever that ran."""
        stream = _stream(x)
        if len(blocks) != len(self._blocks) or any(one is not other for one, other in zip(blocks, self._blocks, strict=True)):
            self.forget()
            self._blocks, self._graphs, self._stream = blocks, Graphs(x.device, True, PLAIN), stream
        if stream != self._stream:
            stream.wait_stream(self._stream)
            for tensor in (self._tokens, self._starts):
                if tensor is not None:
                    tensor.record_stream(stream)
            self._stream = stream

    def _replayed(self, x: torch.Tensor, packed: Packing | None, count: int) -> torch.Tensor:
        batch, length, width = x.shape
        room = count if packed is None else _rounded(count)
        tokens, starts = self._room(x, room, batch + 2)
        if packed is None:
            key, attend = (batch, length), _attend
            tokens = tokens.view(batch, length, width)
            tokens.copy_(x)
        else:
            longest = -(-max(packed.longest, room - count) // TILE) * TILE
            key, attend = (room, batch, longest), partial(attend_packed, starts, longest)
            torch.index_select(x.flatten(0, 1), 0, packed.tokens, out=tokens[:count])
            tokens[count:].zero_()
            starts[:-1].copy_(packed.cu_seqlens)
            starts[-1:].fill_(room)
            tokens = tokens.unsqueeze(0)
        self._graphs.run(key, lambda: tokens.copy_(_through(self._blocks, tokens, attend)))
        return tokens.clone() if packed is None else packed.spread(tokens[:, :count])

    def _room(self, x: torch.Tensor, room: int, starts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For `room` tokens [room, N] and the `starts` of sequences, at the same place as ever, unless there were never so many."""
        with torch.inference_mode(False):
            if self._tokens is None or len(self._tokens) < room:
                self._tokens = torch.zeros((_doubled(room), x.shape[2]), dtype=x.dtype, device=x.device)
                self._graphs.forget()
            if self._starts is None or len(self._starts) < starts:
                self._starts = torch.zeros(_doubled(starts), dtype=torch.int32, device=x.device)
                self._graphs.forget()
        return self._tokens[:room], self._starts[:starts]


class FusedStack(Swapped):
    """What an encoder of fused layers does instead of calling them one by one."""

    _ftops: Stack

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        blocks, stack = None if args else self._blocks(hidden_states, attention_mask, kwargs), self._ftops
        if blocks is not None and not (stack.disturbed and self._disturbed()):
            out = stack.run(blocks, hidden_states, packing(blocks[0].spec, attention_mask, hidden_states, None, None))
            # 0.1 ms of the host's that a GPU need not wait for: it works on tensors that the blocks hold, whatever became of the layers.
            stack.disturbed = self._disturbed()
            if not stack.disturbed:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=out)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _blocks(self, x: torch.Tensor, mask: torch.Tensor | None, given: dict[str, Any]) -> tuple[Block, ...] | None:
        """Of all layers, if nobody would miss their calls, `_disturbed` apart; otherwise they are called, and see for themselves."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or (mask is not None and not hasattr(mask, "_ftops_packing")):
            return None
        layers = self._layers()
        if not layers or not all(isinstance(layer, FusedLayer) and not watched(layer) and own_forward(layer) for layer in layers):
            return None
        if recorded() or layers[0].unfit({"hidden_states": x, "attention_mask": mask, **given}) is not None:
            return None
        if any(layer.unfit_for(x) is not None for layer in layers[1:]):
            return None
        blocks = tuple(layer._ftops.block for layer in layers)
        return blocks if all(_both_ways(block.spec) for block in blocks) else None

    def _disturbed(self) -> bool:
        return any(layer._ftops.disturbed() is not None for layer in self._layers())

    def _layers(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, self._ftops.arch.stack[1])._modules.values())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._ftops.forget()
        return super()._apply(fn, recurse)


def swap_stacks(model: nn.Module) -> None:
    """Gives every encoder in `model` whose layers are all fused the loop over their blocks."""
    for module in model.modules():
        arch = _arch_of(module)
        if arch is not None and own_forward(module) and not isinstance(module, FusedStack):
            module._ftops = Stack(arch)
            change_class(module, swapped_class(FusedStack, type(module)))


def restore_stack(module: nn.Module) -> None:
    change_class(module, original_class(module))
    del module._ftops


def _arch_of(module: nn.Module) -> Arch | None:
    """The family of an encoder all of whose layers are fused."""
    arch = next((arch for arch in ARCHS.values() if arch.matches_stack(module)), None)
    return arch if arch is not None and all(isinstance(layer, FusedLayer) for layer in getattr(module, arch.stack[1])) else None


def _both_ways(spec: BlockSpec) -> bool:
    return not spec.causal and spec.window is None and spec.rotary is None


def _through(blocks: tuple[Block, ...], x: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
    """attend(block's spec, q, k, v)."""
    for block in blocks:
        x = block(x, partial(attend, block.spec))
    return x


def _attend(spec: BlockSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ops.attention(q, k, v, scale=spec.scale)


def _flops_a_token(block: Block) -> int:
    weights = block.weights
    return 2 * sum(rows * columns for rows, columns in (part.weight.shape for part in (weights.qkv, weights.out, weights.up, weights.down)))


def _capturable(x: torch.Tensor) -> bool:
    return x.is_cuda and not heard(x) and not torch.cuda.is_current_stream_capturing()


def _stream(x: torch.Tensor) -> torch.cuda.Stream:
    return torch.cuda.current_stream(x.device)


def _rounded(count: int) -> int:
    """Up to one of STEPS sizes from one power of two to the next."""
    step = max(1, _doubled(count) // (2 * STEPS))
    return -(-count // step) * step


def _doubled(count: int) -> int:
    """The power of two that is not below."""
    return 1 << (count - 1).bit_length()
