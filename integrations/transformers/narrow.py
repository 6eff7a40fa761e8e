"""How keys and values are kept in 8 bits: the scales of a layer's heads, measured of a prompt, and what is read of it."""
from __future__ import annotations

import torch

ROOM = {torch.int8: (1.5, 127), torch.float8_e4m3fn: (8.0, 448)}  # and the dtype's largest number
FEW, ROOM_OF_FEW = 4, 4.0  # tokens of a prompt


class Narrow:
    """In `dtype`, times k_scale and v_scale[Hkv] float32.

    Of one prompt the scales are measured: what the dtype can hold is ROOM times the largest value of a head there, and later ones beyond
    that are clipped. Steps of int8 are as much longer, so that it has little room; numbers of e4m3 are as exact everywhere. A prompt of
    a few words says little about what follows it, and leaves more.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.k_scale, self.v_scale = dtype, None, None

    def measure(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes scales from k, v [B,Hkv,S,D], to where the last ones were."""
        room, largest = ROOM[self.dtype]
        room = max(room, ROOM_OF_FEW) if k.shape[2] < FEW else room
        found = [t.float().abs().amax((0, 2, 3)).clamp(min=1e-6) * (room / largest) for t in (k, v)]
        if self.k_scale is None:
            self.k_scale, self.v_scale = found
        else:
            self.k_scale.copy_(found[0])
            self.v_scale.copy_(found[1])

    def widened(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [...,Hkv,D] of the cache in `dtype`."""
        return widened(k, self.k_scale, dtype), widened(v, self.v_scale, dtype)


def widened(kept: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """kept[...,Hkv,D] of the cache, with scale[Hkv] or [...,Hkv], in `dtype`."""
    return (kept.float() * scale.unsqueeze(-1)).to(dtype)


def scales(narrow: Narrow | None) -> dict[str, torch.Tensor]:
    """As the ops take them."""
    return {} if narrow is None else {"k_scale": narrow.k_scale, "v_scale": narrow.v_scale}
