"""How four-bit weights lie in memory: as the fragments of mma.m16n8k16, so that a thread's 16-byte load is what it multiplies with.

A tile is 32 rows of the weight, 16 i + 8 h + g; a piece is 32 values of k, 8 t + 4 s + 2 c + e. Lane 4 g + t of a warp owns a piece's
values of its rows (i, h) and its t; product s of the piece takes k = (c, e). Rows and k beyond the weight's are there and stand for 0.

    values: int32 [tiles, pieces, lanes, (i, s)]       value (h, c, e) of a word at bit 4 (2 c + h) + 16 e
    of a group: [tiles, groups, g, (i, h), ...]
"""
from __future__ import annotations

import torch

TILE_ROWS, PIECE_K = 32, 32


def tiles_of(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def described(tensor: torch.Tensor) -> str:
    """For errors about packed tensors."""
    return f"{tensor.dtype} {tuple(tensor.shape)}" + ("" if tensor.is_contiguous() else ", not contiguous")


def _padded(values: torch.Tensor, multiple: int, fill: int) -> torch.Tensor:
    rows, columns = values.shape
    return torch.nn.functional.pad(values, (0, -columns % multiple, 0, -rows % TILE_ROWS), value=fill)


def _split(values: torch.Tensor) -> torch.Tensor:
    """[rows, columns] as [tiles, i, h, g, pieces, t, s, c, e]."""
    rows, columns = values.shape
    return values.view(rows // TILE_ROWS, 2, 2, 8, columns // PIECE_K, 4, 2, 2, 2)


def _joined(split: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    tiles, _, _, _, pieces, _, _, _, _ = split.shape
    return split.reshape(TILE_ROWS * tiles, PIECE_K * pieces)[:rows, :columns]


def pack_4bit(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """uint8 values 0 .. 15 [N, K] -> int32 [tiles, pieces, 32, 4]; K is filled up to whole groups with 8."""
    split = _split(_padded(values, group_size, 8)).permute(0, 4, 3, 5, 1, 6, 2, 7, 8)  # tiles, pieces, g, t, i, s | h, c, e
    packed = torch.zeros((*split.shape[:2], 32, 4), dtype=torch.int32, device=values.device)
    words = packed.view(split.shape[:6])  # not the other way round: a view would keep what it is of, also once it has other `data`
    for h in range(2):
        for c in range(2):
            for e in range(2):
                words |= split[..., h, c, e].to(torch.int32) << (4 * (2 * c + h) + 16 * e)
    return packed


def unpack_4bit(words: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The uint8 values [rows, columns] that `pack_4bit` was given."""
    tiles, pieces = words.shape[:2]
    split = torch.empty((tiles, pieces, 8, 4, 2, 2, 2, 2, 2), dtype=torch.uint8, device=words.device)
    words = words.view(tiles, pieces, 8, 4, 2, 2)
    for h in range(2):
        for c in range(2):
            for e in range(2):
                split[..., h, c, e] = (words >> (4 * (2 * c + h) + 16 * e)) & 15
    return _joined(split.permute(0, 4, 6, 2, 1, 3, 5, 7, 8), rows, columns)


def pack_groups(values: torch.Tensor) -> torch.Tensor:
    """A value or more a row and group [N, groups, ...] -> [tiles, groups, 8, 4, ...]; rows beyond N get 0."""
    rows, groups, *rest = values.shape
    padded = torch.cat((values, values.new_zeros((-rows % TILE_ROWS, groups, *rest))))
    split = padded.view(-1, 2, 2, 8, groups, *rest).permute(0, 4, 3, 1, 2, *range(5, 5 + len(rest)))
    return split.reshape(-1, groups, 8, 4, *rest).contiguous()


def unpack_groups(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """What `pack_groups` was given."""
    tiles, groups, _, _, *rest = packed.shape
    split = packed.view(tiles, groups, 8, 2, 2, *rest).permute(0, 3, 4, 2, 1, *range(5, 5 + len(rest)))
    return split.reshape(TILE_ROWS * tiles, groups, *rest)[:rows]


def dequantise_4bit(packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(q - zero) * scale [rows, columns], rounded once to `dtype`; scales [tiles, groups, 8, 4], or [..., 2] with zero points, else 8."""
    wide = torch.promote_types(dtype, torch.float32)
    groups, per_group = scales.shape[1], PIECE_K * packed.shape[1] // scales.shape[1]
    q = unpack_4bit(packed, rows, groups * per_group).view(rows, groups, per_group).to(wide)
    by_row = unpack_groups(scales, rows).to(wide)
    scale, zero = (by_row.unsqueeze(-1), 8) if scales.dim() == 4 else (part.unsqueeze(-1) for part in by_row.unbind(-1))
    return ((q - zero) * scale).view(rows, -1)[:, :columns].to(dtype)
