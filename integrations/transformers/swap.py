"""How a module is swapped: its class becomes a subclass of the original with the same name, and nothing else about it changes.

So hooks, recorders, isinstance checks, parameters and references from elsewhere all stay, and `super().forward` is the way back.
"""
from __future__ import annotations

from functools import cache as remember
from typing import Any

from torch import nn


class Swapped:
    """Base of the mixins that come before the original class in the method resolution order of a swapped module."""

    # What the mixin knows beside the original.
    _ftops: Any

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        """The class was made here and is in no file: copies and pickles name its two halves."""
        _, _, *state = super().__reduce_ex__(2)
        return _blank, type(self).__bases__, *state


def _blank(mixin: type[Swapped], original: type[nn.Module]) -> nn.Module:
    return object.__new__(swapped_class(mixin, original))


@remember
def swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original`, of the same name, that does as the mixin says."""
    return type(original.__name__, (mixin, original), {"__module__": original.__module__, "__doc__": original.__doc__})


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a swapped module, the class that the mixin stands before."""
    kind = type(module)
    return kind.__bases__[1] if isinstance(module, Swapped) else kind


def own_forward(module: nn.Module) -> bool:
    """Whether the module runs its class's forward. accelerate, when it takes a hook off, leaves that one on the instance."""
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def forward_replaced(module: nn.Module) -> bool:
    """Whether someone put another forward on the instance; that of an accelerate hook is no replacement."""
    return "_hf_hook" not in module.__dict__ and not own_forward(module)


def offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the module's weights when it runs and takes them away afterwards."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def bypassable(module: nn.Module) -> bool:
    """Whether nothing is lost if the module is not called: its hooks, if any, only bring inputs to the device of its weights."""
    return not offloaded(module) and all(type(hook).__name__ == "AlignDevicesHook" for hook in _hooks(module))


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Sets the class. An accelerate hook holds the old forward on the instance, so it is taken off and put on again."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module
        remove_hook_from_module(module)
    if own_forward(module):
        module.__dict__.pop("forward", None)
    module.__class__ = kind
    if hook is not None:
        add_hook_to_module(module, hook)
