"""patch and unpatch: model -> plan (pure, printable) -> apply.

A plan names modules by path and holds nothing of the model, so it survives copies. What was done is written on the modules
themselves: their class, and on every transformers model the attention implementation that it had before.
"""
from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ftops.integrations.transformers.arch import Arch, Unfit
from ftops.integrations.transformers.archs import ARCHS
from ftops.integrations.transformers.attention import ROWS, WHOLE, AttentionState, register
from ftops.integrations.transformers.decoder import forget
from ftops.integrations.transformers.generate import Generating, restore_generate, swap_generate
from ftops.integrations.transformers.layer import FusedLayer, examine, restore_layer, swap_layer
from ftops.integrations.transformers.leaves import FusedNorm, NormState, examine_norm, is_norm, restore_norm, swap_norm
from ftops.integrations.transformers.quantizer import QuantConfig, quantize
from ftops.integrations.transformers.report import REGISTRY, check_model
from ftops.integrations.transformers.stack import FusedStack, restore_stack, swap_stacks
from ftops.integrations.transformers.swap import offloaded
from ftops.quant.module import Quantized
from ftops.report import Report, Row

_LOG = logging.getLogger("ftops")
CACHES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # what kv_cache may be


@dataclass(frozen=True)
class Step:
    """One module: what takes its place, an Arch, a NormState or the attention registry's name; or None and why not."""

    path: str
    kind: str
    swap: Arch | NormState | str | None
    reason: str = ""

    @property
    def swapped_to(self) -> str | None:
        if isinstance(self.swap, Arch):
            return f"ftops block ({self.swap.name})"
        if isinstance(self.swap, NormState):
            return f"ops.{self.swap.op}"
        return self.swap


@dataclass(frozen=True)
class Plan:
    """What patch will do: `steps` in module order, and the attention implementation for each transformers model, by path."""

    model: str
    family: str | None
    steps: tuple[Step, ...]
    attention: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return str(Report(self.model, self.family, tuple(Row(s.path, s.kind, s.swapped_to, s.reason) for s in self.steps)))


def patch(model: nn.Module, *, quant: str | QuantConfig | None = None, kv_cache: str | None = None, tp: int | None = None,
          pp: int | None = None) -> nn.Module:
    """See `ftops.patch`."""
    _check(model, tp=tp, pp=pp)
    _check_kv_cache(model, kv_cache)
    if quant is not None:
        quantize(model, quant)
    register()
    apply(model, plan(model))
    forget(model)
    model.__dict__.pop("_ftops_kv_cache", None)
    if kv_cache is not None:
        model._ftops_kv_cache = CACHES[kv_cache]
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """See `ftops.unpatch`."""
    check_model("unpatch", model)
    formats = sorted({module.format for module in model.modules() if isinstance(module, Quantized)})
    if formats:
        _LOG.warning("unpatch: layers, attention and generate are the original's again; its linear layers stay %s, since their weights "
                     "were let go. Load the model again for those, or call model.dequantize() for what was kept of them",
                     " and ".join(formats))
    for module in model.modules():
        if isinstance(module, FusedLayer):
            restore_layer(module)
        elif isinstance(module, FusedNorm):
            restore_norm(module)
        elif isinstance(module, FusedStack):
            restore_stack(module)
        elif isinstance(module, Generating):
            restore_generate(module)
        module.__dict__.pop("_ftops_attention", None)
        module.__dict__.pop("_ftops_plan", None)
        module.__dict__.pop("_ftops_kv_cache", None)
        before = module.__dict__.pop("_ftops_before", None)
        if before is not None:
            module.config._attn_implementation_internal = before
    return model


def _check(model: object, **options: object) -> None:
    """Everything that can be wrong with a call of patch, before anything is changed."""
    check_model("patch", model)
    meaning = {"tp": "tensor parallelism", "pp": "pipeline parallelism"}
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"patch: {name} is {value!r}; allowed: None ({meaning[name]} is not in this version)")
    away = tuple(f"{path}." if path else "" for path, module in model.named_modules() if offloaded(module))
    for path, parameter in model.named_parameters():
        if parameter.is_meta and not path.startswith(away):
            raise ValueError(f"patch: parameter {path} is on the meta device and has no values; "
                             "load the weights first (from_pretrained, or to_empty and load_state_dict), then patch")


def _check_kv_cache(model: nn.Module, kv_cache: str | None) -> None:
    if kv_cache is None:
        return
    if kv_cache not in CACHES:
        raise ValueError(f"patch: kv_cache is {kv_cache!r}; allowed: None, {', '.join(map(repr, CACHES))}")
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"patch: kv_cache is {kv_cache!r} but {type(model).__name__} does not generate; leave it out")
    if not any(isinstance(module, FusedLayer) for module in model.modules()) and plan(model).family is None:
        raise ValueError(f"patch: kv_cache is {kv_cache!r} but no layer of {type(model).__name__} becomes an ftops block, which is what "
                         "keeps keys and values in 8 bits; leave it out")


def plan(model: nn.Module) -> Plan:
    """What patch would do with `model` as it is. Changes nothing."""
    steps: dict[str, Step] = {}
    groups: dict[int, _Group] = {}
    owners: dict[str, PreTrainedModel] = {}
    for path, module, step in _outside_layers(model):
        if isinstance(module, PreTrainedModel):
            owners[path] = module
        owner = _owner(owners, path)
        group = _Group() if owner is None else groups.setdefault(id(owner.config), _Group())
        if step is not None:
            steps[path] = step
        arch = module._ftops.arch if isinstance(module, FusedLayer) else _family(module)
        if arch is None:
            group.callers += [path] if owner is not None and _calls_registry(module) and module.config is owner.config else []
        elif step is None or step.swap is not None:
            group.fused.append(arch)
        else:
            group.kept = True
    attention = []
    for path, owner in owners.items():
        group, before = groups[id(owner.config)], owner.config._attn_implementation
        name, reason = group.attention(before, owner._supports_attention_backend or owner._supports_sdpa)
        if name is not None:
            attention.append((path, name))
        for caller in group.callers:
            steps[caller] = Step(caller, type(model.get_submodule(caller)).__name__, REGISTRY if name else None, reason)
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    families = [step.swap.name for step in steps.values() if isinstance(step.swap, Arch)]
    return Plan(type(model).__name__, families[0] if families else None,
                tuple(sorted(steps.values(), key=lambda step: order[step.path])), tuple(attention))


def apply(model: nn.Module, plan: Plan) -> None:
    """Does what the plan says. If that fails, as when memory runs out, the model is put back as it was."""
    try:
        if plan.attention:
            _own_configs(model)
        for path, _ in plan.attention:
            owner = model.get_submodule(path)
            owner._ftops_before = owner.config._attn_implementation
        for path, name in plan.attention:
            model.get_submodule(path).config._attn_implementation_internal = name
        owners = {path: module for path, module in model.named_modules() if isinstance(module, PreTrainedModel)}
        for step in plan.steps:
            module = model.get_submodule(step.path)
            owner = _owner(owners, step.path)
            before = None if owner is None else owner.__dict__.get("_ftops_before", owner.config._attn_implementation)
            if isinstance(step.swap, Arch):
                swap_layer(step.swap, module, before or "sdpa")
            elif isinstance(step.swap, NormState):
                swap_norm(copy.deepcopy(step.swap), module)
            elif step.swap is not None:
                module._ftops_attention = AttentionState(before or "sdpa")
        if plan.steps:
            model._ftops_plan = plan
        for module in model.modules():
            if isinstance(module, FusedLayer) and (module._ftops.block is None or module._ftops.disturbed()):
                module._ftops.build(module)
        swap_stacks(model)
        swap_generate(model)
    except BaseException:
        unpatch(model)
        raise


@dataclass
class _Group:
    """The modules that live under one configuration, and so under one attention implementation."""

    fused: list[Arch] = field(default_factory=list)
    kept: bool = False
    callers: list[str] = field(default_factory=list)

    def attention(self, before: str | None, supported: bool) -> tuple[str | None, str]:
        """The implementation to set, or None, and why not."""
        if before in (ROWS, WHOLE):
            return None, ""
        if self.fused and not self.kept and not self.callers:
            return ROWS, ""
        if any(not arch.uses_registry for arch in self.fused):
            return None, "layers beside it add the mask they are given to the scores"
        if not self.fused and not self.callers:
            return None, ""
        if before not in ("sdpa", "eager"):
            return None, f"attention is {before}; load with sdpa or eager"
        if not supported:
            return None, "the model does not support other attention functions"
        return WHOLE, ""


def _step(path: str, module: nn.Module) -> Step | None:
    """What to do with one module; None if there is nothing to say about it."""
    if isinstance(module, (FusedLayer, FusedNorm)):
        return None
    kind, arch = type(module).__name__, _family(module)
    try:
        if arch is not None:
            examine(arch, module)
            return Step(path, kind, arch)
        return Step(path, kind, examine_norm(module)) if is_norm(module) else None
    except Unfit as unfit:
        return Step(path, kind, None, str(unfit))


def _family(module: nn.Module) -> Arch | None:
    return next((arch for arch in ARCHS.values() if arch.matches(module)), None)


def _outside_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Step | None]]:
    """Every module but those inside of layers that are, or can be, fused, and what to do with it."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        step = _step(path, module)
        yield path, module, step
        if isinstance(module, FusedLayer) or (step is not None and isinstance(step.swap, Arch)):
            inside = f"{path}." if path else ""


def _owner(owners: dict[str, PreTrainedModel], path: str) -> PreTrainedModel | None:
    """The transformers model that the module at `path` belongs to, the nearest above it."""
    above = [root for root in owners if not root or path == root or path.startswith(f"{root}.")]
    return owners[max(above, key=len)] if above else None


def _calls_registry(module: nn.Module) -> bool:
    """Whether the module's own forward goes through the attention registry; its file and its configuration may say so and lie."""
    forward = inspect.unwrap(type(module).forward)
    return hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _own_configs(model: nn.Module) -> None:
    """Gives the model configurations of its own: others may have been made from the same object, and stay unpatched."""
    copies: dict[int, object] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if isinstance(value, PreTrainedConfig):
                module.__dict__[name] = copy.deepcopy(value, copies)
