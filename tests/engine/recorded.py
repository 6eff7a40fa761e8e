"""CUDA graphs as far as a CPU has them: what was launched is launched again, on the very tensors that were there when it was recorded."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a capture forbids: the host would wait for a value, or a shape hang on one.
WAITS = {getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")}


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func} in a capture")
        out = func(*args, **(kwargs or {}))
        self.launched.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.launched:
            again = func(*args, **kwargs)
            for new, kept in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(new, torch.Tensor) and new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


class Recorded:
    """In place of `batch.Graphs`."""

    replays = 0

    def __init__(self, device: torch.device, capturable: bool, plain: int) -> None:
        self._plain, self._graphs, self._times = min(plain, 2), {}, Counter()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key in self._graphs:
            self._graphs[key].replay()
            Recorded.replays += 1
            return
        self._times[key] += 1
        if self._times[key] < self._plain:
            work()
            return
        self._graphs[key] = Recording()
        with self._graphs[key]:
            work()

    def forget(self) -> None:
        self._graphs.clear()
        self._times.clear()
