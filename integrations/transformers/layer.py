"""A transformers layer that runs as one ftops block. What that cannot give, the original's forward does; `State.fallbacks` counts why."""
from __future__ import annotations

import inspect
from collections import Counter
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

from ftops.block import Block, BlockSpec
from ftops.integrations.transformers.arch import Arch, Unfit, follow
from ftops.integrations.transformers.attention import INSTEAD, ROWS, SILENT, register, weights_requested
from ftops.integrations.transformers.cache import attend, causal_bias, is_rows, slots, unfit_cache
from ftops.integrations.transformers.packing import packing, run_packed
from ftops.integrations.transformers.swap import (
    Swapped,
    bypassable,
    change_class,
    forward_replaced,
    offloaded,
    original_class,
    swapped_class,
)
from ftops.integrations.transformers.weights import assemble, check_parts, check_rows, release
from ftops.quant import QuantizedWeight
from ftops.quant.module import Quantized

# Where the modules inside of a layer may come from, besides the layer's own file.
KNOWN = ("torch.nn.modules.", "transformers.activations", "transformers.pytorch_utils", "ftops.quant.module")
# Arguments of a layer's forward that the block uses or that change nothing; any other one that is given means a fallback.
SERVED = (SILENT | {"hidden_states", "attention_mask", "layer_past"}) - {"is_causal"}


def examine(arch: Arch, layer: nn.Module) -> BlockSpec:
    """The block that can take the layer's place. Raises Unfit with the reason if none can. Changes nothing."""
    if any(map(offloaded, layer.modules())):
        raise Unfit("accelerate offloads it")
    for name, module in layer.named_modules():
        if name and not bypassable(module):
            raise Unfit(f"accelerate hooks {name}")
        if forward_replaced(module):
            raise Unfit(f"the forward of {name or 'the layer'} was replaced")
        kind = original_class(module)
        if not kind.__module__.startswith(KNOWN) and kind.__module__ != type(layer).__module__:
            raise Unfit(f"{name} is a {kind.__name__} of {kind.__module__}")
        owner = next(base for base in kind.__mro__ if "forward" in base.__dict__)
        if owner.forward.__module__ != owner.__module__:
            raise Unfit(f"the forward of {owner.__name__} was replaced")
    check_parts(arch, layer)
    spec = arch.spec(layer)
    check_rows(arch, layer, spec)
    return spec


class State:
    """What a fused layer knows beside the original: its description, its block (None: `reason` says why) and its fallbacks.

    before: the attention implementation that the original uses when it serves a call.
    """

    def __init__(self, arch: Arch, layer: nn.Module, before: str) -> None:
        self.arch, self.before = arch, before
        self.arguments = tuple(inspect.signature(type(layer).forward).parameters)[1:]
        self.fallbacks: Counter[str] = Counter()
        self.build(layer)

    def build(self, layer: nn.Module) -> None:
        """Fuses the parameters as they are now. Afterwards `block` is None if they no longer fit."""
        self.block, self.reason = None, None
        try:
            spec = examine(self.arch, layer)
        except Unfit as unfit:
            self.reason = str(unfit)
            return
        # Inside inference mode the slices would be inference tensors, and the model could not be trained after unpatch.
        with torch.inference_mode(False), torch.no_grad():
            self.block = Block(spec, assemble(self.arch, layer))
        self.index = getattr(follow(layer, self.arch.attention), "layer_idx", None)
        self.dropout = self.arch.dropout(layer)
        self.dtype, self.device = self.block.weights.qkv.weight.dtype, self.block.weights.qkv.weight.device
        for tensor in _tensors(self.block):
            # As transformers does for its static caches: without it CUDA graphs of torch.compile would copy the weights at each replay.
            torch._dynamo.mark_static_address(tensor)
        inner = tuple(module for module in layer.modules() if module is not layer)
        quantised = [module for module in inner if isinstance(module, Quantized)]
        held = [(module.__dict__[kind], name, value) for module in (layer, *inner) for kind in ("_modules", "_parameters")
                for name, value in module.__dict__[kind].items()]
        held += [(module._buffers, name, value) for module in quantised for name, value in module._buffers.items()]
        held += [(module.__dict__, "forward", module.__dict__.get("forward")) for module in inner]
        # Columns, not rows: what a check reads lies close together.
        self._held = tuple(zip(*held, strict=True))
        tensors = (*layer.parameters(), *(tensor for module in quantised for tensor in module._buffers.values()))
        self._memory = tensors, tuple(tensor.data_ptr() for tensor in tensors)
        self._hooks = (*(hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)),
                       module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)
        self._hooks_seen = -1

    def disturbed(self) -> str | None:
        """Whether someone put other modules, parameters, forwards or hooks inside the layer, which the block would pass by.

        It runs at every call, when the weights have just emptied the caches: what counts is how much memory it looks at.
        """
        for owner, name, held in zip(*self._held, strict=False):
            if owner.get(name) is not held:
                return f"{name} was replaced; call ftops.patch(model) again"
        for tensor, address in zip(*self._memory, strict=False):
            if tensor.data_ptr() != address:
                return "parameters were given other memory; call ftops.patch(model) again"
        # Every hook that is registered, anywhere, draws a number.
        if self._hooks_seen != RemovableHandle.next_id:
            hooks = chain.from_iterable(map(dict.values, filter(None, self._hooks)))
            if any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks):
                return "hooks inside"
            self._hooks_seen = RemovableHandle.next_id
        return None

    def __getstate__(self) -> dict[str, Any]:
        # The copied layer builds its own block once its parts are copied, in __setstate__.
        return {"arch": self.arch, "before": self.before, "arguments": self.arguments, "fallbacks": Counter(self.fallbacks)}


class FusedLayer(Swapped):
    """What a fused layer does instead of, or before, the original."""

    _ftops: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._ftops
        given = kwargs
        given.update(zip(state.arguments, args, strict=False))
        reason = self.unfit(given)
        if reason is not None:
            # A count that changes would be a guard, and a new compilation each time.
            if not torch.compiler.is_compiling():
                state.fallbacks[reason] += 1
            return self._original(given)
        cache, mask = given.get(state.arch.cache), given.get("attention_mask")
        spec, index = state.block.spec, state.index
        x, (positions, freqs) = given["hidden_states"], state.arch.rotation(self, given)
        packed = packing(spec, mask, x, cache, index)
        if packed is not None:
            out = run_packed(state.block, x, packed, positions, freqs, cache, index)
        else:
            kept = slots(cache, index, x, mask) or (lambda q, k, v: attend(spec, q, k, v, cache, index, mask))
            out = state.block(x, kept, positions, freqs)
        return (out, None) if state.arch.returns_tuple else out

    def unfit(self, given: dict[str, Any]) -> str | None:
        """Why this call must go to the original layer, or None."""
        state, x = self._ftops, given["hidden_states"]
        unfit = self.unfit_for(x)
        if unfit is not None:
            return unfit
        if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())):
            return "gradients"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast"
        if weights_requested(given):
            return "attention weights"
        for name, value in given.items():
            if value is not None and value is not False and name not in SERVED:
                return f"argument {name}"
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            return "attention_mask is not 4-D"
        cache = given.get(state.arch.cache)
        unfit = unfit_cache(cache, state.index)
        if unfit is not None or torch.compiler.is_compiling():
            return unfit
        return state.disturbed()

    def unfit_for(self, x: torch.Tensor) -> str | None:
        """Why the block cannot be given x[B,S,N], whatever else the call asks for, or None."""
        state = self._ftops
        if state.block is None:
            return state.reason
        if self.training and state.dropout:
            return "training with dropout"
        if x.dtype is not state.dtype or x.device != state.device:
            return f"hidden_states are {x.dtype} on {x.device.type}, weights {state.dtype} on {state.device.type}"
        return None

    def _original(self, given: dict[str, Any]) -> Any:
        """The original layer's own forward, with a mask that it understands."""
        state, mask = self._ftops, given.get("attention_mask")
        if follow(self, state.arch.attention).config._attn_implementation == ROWS:
            if is_rows(mask):
                given["attention_mask"] = self._whole_mask(given, mask)
            if state.arch.uses_registry:
                given[INSTEAD] = state.before
        return super().forward(**given)

    def _whole_mask(self, given: dict[str, Any], rows: torch.Tensor | None) -> torch.Tensor | None:
        """rows, causality and window as one mask: bool for transformers' SDPA, None where that needs none, additive without registry."""
        arch, x = self._ftops.arch, given["hidden_states"]
        spec, attention = arch.spec(self), follow(self, arch.attention)
        cache, length = given.get(arch.cache), x.shape[1]
        keys, first, offset = length, 0, 0
        if cache is not None:
            (keys, first), offset = cache.get_mask_sizes(length, attention.layer_idx), cache.get_seq_length(attention.layer_idx)
        alone = keys == length and (spec.window is None or length <= spec.window)
        if rows is None and arch.uses_registry and (alone or not spec.causal):
            return None
        bias = causal_bias(spec, length, keys, offset - first, x, rows)
        return bias == 0 if arch.uses_registry else bias.clamp(min=torch.finfo(x.dtype).min)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to()` and the like give every parameter memory of its own, so the block is built anew."""
        self._ftops.block = None
        module = super()._apply(fn, recurse)
        self._ftops.build(self)
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()
        super().__setstate__(state)
        self._ftops.build(self)


def _after_load(layer: FusedLayer, _: object) -> None:
    """`load_state_dict(assign=True)` puts other parameters in place."""
    layer._ftops.build(layer)


def swap_layer(arch: Arch, layer: nn.Module, before: str) -> None:
    layer._ftops = State(arch, layer, before)
    layer.register_load_state_dict_post_hook(_after_load)
    change_class(layer, swapped_class(FusedLayer, type(layer)))


def restore_layer(layer: nn.Module) -> None:
    arch = layer._ftops.arch
    change_class(layer, original_class(layer))
    hooks = layer._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _after_load]:
        del hooks[key]
    del layer._ftops
    with torch.inference_mode(False), torch.no_grad():
        release(arch, layer)


def _tensors(block: Block) -> list[torch.Tensor]:
    weights = [value for value in vars(block.weights).values() if value is not None]
    held = [tensor for part in weights for tensor in (part.weight, part.bias) if tensor is not None]
    return [tensor for one in held for tensor in (one.tensors.values() if isinstance(one, QuantizedWeight) else (one,))]
