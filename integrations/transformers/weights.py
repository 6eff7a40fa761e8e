"""A layer's parameters as the block wants them: q, k, v as one matrix, gate and up as one, without a second copy.

The fused matrix is made once and the original parameters become slices of it, so they stay the same objects with the same values.
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftops.block import BlockSpec, BlockWeights, Linear, Norm
from ftops.integrations.transformers.arch import Arch, Unfit, follow
from ftops.op import DTYPES
from ftops.quant import QuantizedWeight
from ftops.quant.join import check_join, fuse, join
from ftops.quant.module import QuantizedLinear


def parts(arch: Arch) -> tuple[str, ...]:
    """Paths of the modules whose parameters the block uses."""
    return (*arch.norms, *arch.qkv, *(arch.qk_norms or ()), arch.out, *arch.up, arch.down)


def check_parts(arch: Arch, layer: nn.Module) -> None:
    """Raises Unfit, naming the part, for modules and weights that the block cannot use as they are. Changes nothing."""
    norms = (*arch.norms, *(arch.qk_norms or ()))
    for path in parts(arch):
        part = follow(layer, path)
        kind = type(part)
        if path not in norms and kind not in (nn.Linear, Conv1D, QuantizedLinear):
            raise Unfit(f"{path} is a {kind.__name__}, not a plain linear")
        if path in norms and (kind is not nn.LayerNorm if arch.norm == "layer" else kind.__module__ != type(layer).__module__):
            raise Unfit(f"{path} is a {kind.__name__}, not the family's own norm")
        if kind is not QuantizedLinear and part.weight is None:
            raise Unfit(f"{path} has no weight")
    parameters = list(_parameters(arch, layer))
    for path, parameter in parameters:
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            raise Unfit(f"{path} holds a {type(parameter.data).__name__}")
        if parameter.device.type not in ("cpu", "cuda"):
            raise Unfit(f"{path} is on {parameter.device}")
        if parameter.dtype not in DTYPES:
            raise Unfit(f"{path} is {parameter.dtype}")
    kinds = {(parameter.dtype, parameter.device) for _, parameter in parameters}
    quantised = [part.qw for part in (follow(layer, path) for path in parts(arch)) if type(part) is QuantizedLinear]
    if len(kinds | {(qw.dtype, qw.device) for qw in quantised}) > 1:
        raise Unfit("its parameters have different dtypes or devices")
    if any(buffer.is_meta for buffer in layer.buffers()):
        raise Unfit("it has buffers on the meta device")
    for group in (arch.qkv, arch.up):
        modules = [follow(layer, path) for path in group]
        if len({module.bias is None for module in modules}) > 1:
            raise Unfit(f"some of {', '.join(group)} have a bias and some have not")
        quantised = [module.qw for module in modules if type(module) is QuantizedLinear]
        if quantised and len(quantised) < len(modules):
            raise Unfit(f"some of {', '.join(group)} are quantised and some are not")
        try:
            check_join(quantised)
        except ValueError as error:
            raise Unfit(f"{', '.join(group)} are not one weight: {error}") from None
        if not quantised and len({id(module.weight) for module in modules}) < len(modules):
            raise Unfit(f"{', '.join(group)} share a weight")


def check_rows(arch: Arch, layer: nn.Module, spec: BlockSpec) -> None:
    """Raises Unfit if q, k and v do not have the heads of `spec`."""
    rows = sum(_weight(follow(layer, path)).shape[0] for path in arch.qkv)
    expected = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    if rows != expected:
        raise Unfit(f"q, k and v have {rows} rows together, not {expected}: heads were removed or split")


def assemble(arch: Arch, layer: nn.Module) -> BlockWeights:
    """The block's weights; what had to be fused now lies behind the original parameters as well."""
    norms = [_norm(layer, path) for path in arch.norms]
    q_norm, k_norm = (_norm(layer, path) for path in arch.qk_norms) if arch.qk_norms else (None, None)
    return BlockWeights(
        norm1=norms[0], norm2=norms[1] if len(norms) > 1 else None, qkv=_linear(layer, arch.qkv), out=_linear(layer, (arch.out,)),
        up=_linear(layer, arch.up), down=_linear(layer, (arch.down,)), q_norm=q_norm, k_norm=k_norm)


def release(arch: Arch, layer: nn.Module) -> None:
    """Gives the fused parameters memory of their own again."""
    for group in (arch.qkv, arch.up):
        for module in (follow(layer, path) for path in group if len(group) > 1):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.clone()


def _weight(module: nn.Module) -> torch.Tensor | QuantizedWeight:
    """The weight as [out, in]; Conv1D keeps it as [in, out]."""
    if type(module) is QuantizedLinear:
        return module.qw
    return module.weight.data.t() if type(module) is Conv1D else module.weight.data


def _linear(layer: nn.Module, paths: tuple[str, ...]) -> Linear:
    modules = [follow(layer, path) for path in paths]
    if len(modules) == 1:
        bias = modules[0].bias
        return Linear(_weight(modules[0]), None if bias is None else bias.data)
    bias = None if modules[0].bias is None else fuse([module.bias for module in modules])
    if type(modules[0]) is QuantizedLinear:
        return Linear(join([module.qw for module in modules]), bias)
    return Linear(fuse([module.weight for module in modules]), bias)


def _norm(layer: nn.Module, path: str) -> Norm:
    module = follow(layer, path)
    bias = getattr(module, "bias", None)
    return Norm(module.weight.data, None if bias is None else bias.data)


def _parameters(arch: Arch, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for path in parts(arch):
        for parameter in follow(layer, path).parameters(recurse=False):
            yield path, parameter
