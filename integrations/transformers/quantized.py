"""The linear layers of a model, fused ones and others, in a weight format; their 16-bit weights are let go.

Each layer of weights becomes a QuantizedLinear at the same place. Fused layers take those as they took nn.Linear: q, k, v are one weight,
and so are gate and up.
"""
from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftops.integrations.transformers.config import QuantConfig, Spec
from ftops.integrations.transformers.layer import FusedLayer
from ftops.integrations.transformers.swap import forward_replaced, offloaded
from ftops.op import DTYPES
from ftops.quant import FORMATS, QuantizedWeight
from ftops.quant.module import Quantized, QuantizedEmbedding, QuantizedLinear


@dataclass(frozen=True)
class Target:
    """A module to quantise, and how. `shape`: (N, K) of its weight."""

    module: nn.Module
    spec: Spec | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, module: nn.Module, spec: Spec | None = None) -> Target | None:
        """None for a module that cannot be quantised."""
        if type(module) not in (nn.Linear, Conv1D, nn.Embedding):
            return None
        rows, columns = module.weight.shape
        return cls(module, spec, (columns, rows) if type(module) is Conv1D else (rows, columns))

    @property
    def transposed(self) -> bool:
        return type(self.module) is Conv1D

    def oriented(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, as the module has it, as [N, K], row by row: formats keep the order that they are given."""
        return (weight.detach().t() if self.transposed else weight.detach()).contiguous()


def targets(model: nn.Module, config: QuantConfig) -> dict[str, Target]:
    """What `config` quantises in `model`, by path. Raises ValueError, naming the module, for what it asks and cannot be."""
    found: dict[str, Target] = {}
    heads, embedding = _heads(model), _embedding(model)
    unused = dict.fromkeys(config.overrides)
    for path, module in model.named_modules():
        if isinstance(module, Quantized):
            raise ValueError(f"quantize: {path} is quantised already ({module.format}); load the original model to choose another format")
        linear = type(module) in (nn.Linear, Conv1D)
        if not linear and module is not embedding:
            continue
        pattern = next((pattern for pattern in config.overrides if fnmatchcase(path, pattern)), None)
        if pattern is not None:
            unused.pop(pattern, None)
            spec = config.override(pattern)
        else:
            spec = config.head_spec if module in heads else config.spec if linear else config.embeddings_spec
        if spec is not None:
            found[path] = Target.of(module, spec)
            _check(path, found[path])
    if unused:
        raise ValueError(f"quantize: overrides has {', '.join(map(repr, unused))}, which match no linear layer; module paths are such as "
                         f"{next(iter(found), 'model.layers.0.mlp.down_proj')}, * stands for anything")
    if not found:
        raise ValueError(f"quantize: {type(model).__name__} has no nn.Linear or Conv1D that the configuration would quantise")
    return found


def _check(path: str, target: Target) -> None:
    module, spec, weight = target.module, target.spec, target.module.weight
    if isinstance(module, nn.Embedding) and spec.format not in QuantizedEmbedding.FORMATS:
        raise ValueError(f"quantize: embeddings is {spec.format!r}; allowed: None, {', '.join(QuantizedEmbedding.FORMATS)}, whose rows "
                         "are read one by one")
    if offloaded(module):
        raise ValueError(f"quantize: {path} is offloaded by accelerate; load the model on one device, or with "
                         "from_pretrained(..., quantization_config=ftops.QuantConfig(...))")
    if forward_replaced(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"quantize: {path} has hooks or another forward, which would be lost; take them off, or keep the layer: "
                         f"overrides={{{path!r}: None}}")
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        raise ValueError(f"quantize: {path}.weight is a {type(weight).__name__} of {weight.dtype}; allowed: parameters of float32, "
                         f"float16, bfloat16, or overrides={{{path!r}: None}}")
    size = spec.group_size
    if size is not None and target.shape[1] < size:
        smaller = [g for g in FORMATS[spec.format].GROUP_SIZES if g <= target.shape[1]]
        raise ValueError(f"quantize: {path} has {target.shape[1]} inputs, fewer than group_size {size}; allowed: "
                         + (f"group_size={smaller[-1]}, or " if smaller else "") + f"overrides={{{path!r}: None}}")


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output head: linears outside of the base model, and whatever shares the embedding's weight."""
    embedding, base = _embedding(model), getattr(model, "base_model", None)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = set(base.modules()) if base is not None and base is not model else None
    return {module for module in model.modules() if type(module) in (nn.Linear, Conv1D) and (
        module is output or (inside is not None and module not in inside)
        or (embedding is not None and module.weight is embedding.weight))}


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """The embedding of words, if the model has a plain one."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if type(found) is nn.Embedding else None


def check_values(found: dict[str, Target]) -> None:
    """Raises ValueError for weights without values, or with some that no format can hold."""
    for path, target in found.items():
        if target.module.weight.is_meta:
            raise ValueError(f"quantize: {path}.weight is on the meta device and has no values; load the weights first")
        if not target.module.weight.isfinite().all():
            raise ValueError(f"quantize: {path}.weight is not finite everywhere; infinities and NaN have no nearest integer. "
                             f"Keep the layer: overrides={{{path!r}: None}}")


def quantize_weight(weight: torch.Tensor, target: Target, smooth: torch.Tensor | None = None) -> QuantizedWeight:
    """`weight` as the module has it, in the target's format."""
    options = target.spec.options if smooth is None else {**target.spec.options, "smooth": smooth}
    with torch.inference_mode(False), torch.no_grad():
        return FORMATS[target.spec.format].quantize(target.oriented(weight), **options)


def put(model: nn.Module, target: Target, qw: QuantizedWeight) -> None:
    """Puts a quantised module wherever the target's module is."""
    module = target.module
    new = QuantizedEmbedding(qw) if isinstance(module, nn.Embedding) else QuantizedLinear(qw, module.bias, target.transposed)
    _replace(model, module, new)


def _replace(model: nn.Module, module: nn.Module, new: nn.Module) -> None:
    new.train(module.training)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = new
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module
        add_hook_to_module(new, hook)


def quantize_targets(model: nn.Module, found: dict[str, Target], smooth: dict[str, torch.Tensor] | None = None) -> None:
    """Quantises `found` in place, a layer at a time, so that no more than one layer is there twice; empties it as it goes."""
    layers = {id(module): layer for layer in model.modules() if isinstance(layer, FusedLayer) for module in layer.modules()}
    embedding = _embedding(model)
    if embedding is not None and any(target.module.weight is embedding.weight for target in found.values()):
        _untie(model)
    del embedding
    while found:
        path = next(iter(found))
        target = found.pop(path)
        weight, layer = target.module.weight, layers.get(id(target.module))
        put(model, target, quantize_weight(weight, target, smooth.get(path) if smooth else None))
        if layer is not None and (not found or layers.get(id(next(iter(found.values())).module)) is not layer):
            del target, weight
            layer._ftops.build(layer)


def _untie(model: nn.Module) -> None:
    """A head or an embedding in a format of its own no longer shares the weight of the other; and then, by the file, nothing is shared."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    embedding = _embedding(model)
    for name in model.all_tied_weights_keys:
        path, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), leaf)
        if parameter is not embedding.weight:
            setattr(model.get_submodule(path), leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    model.all_tied_weights_keys = {}


def restore(model: nn.Module) -> None:
    """Every quantised module as the class it was before, with the weight that its format kept."""
    for module in [module for module in model.modules() if isinstance(module, Quantized)]:
        weight = nn.Parameter(module.weight.contiguous(), requires_grad=False)
        with torch.device("meta"):
            if isinstance(module, QuantizedEmbedding):
                new = nn.Embedding(*module.shape)
            elif module.transposed:
                new = Conv1D(*module.shape)
            else:
                new = nn.Linear(*reversed(module.shape), bias=module.bias is not None)
        new.weight = weight
        if isinstance(module, QuantizedLinear):
            new.bias = module.bias
        _replace(model, module, new)
    for layer in model.modules():
        if isinstance(layer, FusedLayer):
            layer._ftops.build(layer)
