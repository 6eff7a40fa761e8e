"""Rows that no block of attention computes, or that blocks past the end write over: the order of tiles, walked here as a block walks it."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ftops.numba_kernels import attention_sm90_config, attention_sm90_load

DIVIDE = SimpleNamespace(div_u32=lambda a, b: np.uint32(int(a) // int(b)))


@pytest.mark.parametrize("tiles", [1, 3, 8])
@pytest.mark.parametrize(("batches", "heads"), [(1, 1), (1, 9), (5, 7), (4, 16)])
@pytest.mark.parametrize("section", [1, 2, 8, 16, 64])
@np.errstate(over="ignore")
def test_every_tile_once_and_nothing_after(monkeypatch, tiles, batches, heads, section):
    monkeypatch.setattr(attention_sm90_load, "ptx", DIVIDE)
    pairs = batches * heads
    section = min(section, pairs)
    walk = [attention_sm90_load.dense_tile.py_func(*(np.uint32(n) for n in (index, tiles, heads, pairs, section)))
            for index in range(tiles * (pairs + section) + 200)]  # blocks look past the end until they find nothing
    there, beyond = walk[: tiles * pairs], walk[tiles * pairs :]
    assert {tuple(map(int, tile)) for tile in there} == {(b, h, t) for b in range(batches) for h in range(heads) for t in range(tiles)}
    assert all(batch == attention_sm90_load.NOTHING for batch, _, _ in beyond)
    for start in range(0, pairs, section):  # within a section, whose keys stay in L2, the longest tiles come first
        part = [int(tile) for _, _, tile in there[tiles * start : tiles * min(start + section, pairs)]]
        assert part == sorted(part)


@pytest.mark.parametrize("parts", [1, 2, 7, 16])
def test_every_key_in_one_part(monkeypatch, parts):
    """Tiles of keys from the last to the first, whatever their number; no part has two more than another."""
    monkeypatch.setattr(attention_sm90_load, "ptx", DIVIDE)
    for count in (0, 1, 6, 16, 129):
        shares = [tuple(map(int, attention_sm90_load.share_of.py_func(*map(np.uint32, (count, part, parts))))) for part in range(parts)]
        assert [passed for passed, _ in shares] == [sum(mine for _, mine in shares[:part]) for part in range(parts)]
        assert sum(mine for _, mine in shares) == count
        assert max(mine for _, mine in shares) - min(mine for _, mine in shares) <= 1


@pytest.mark.parametrize(("queries", "keys", "short"), [(128, 128, True), (256, 256, True), (384, 384, False), (512, 512, True),
                                                        (768, 768, False), (4096, 4096, False), (16384, 16384, False)])
def test_tiles_of_192_rows_where_they_are_not_wasted(queries, keys, short):
    """At head_dim 64: 18.3 instead of 13.7 us for 16 prompts of 128 tokens, 45 instead of 36 us for BERT's 384."""
    assert attention_sm90_config.is_short(64, queries, keys) is short


@pytest.mark.parametrize(("batch", "queries", "keys", "kv_heads", "parts"), [
    (1, 64, 16384, 8, 8), (1, 256, 16384, 8, 2), (4, 64, 16384, 8, 2), (1, 64, 2048, 8, 4), (1, 32, 16384, 32, 4), (16, 64, 16384, 8, 1),
    (16, 32, 512, 8, 1), (16, 128, 16384, 8, 0), (4, 128, 2048, 8, 0), (1, 256, 2048, 8, 0), (1, 64, 512, 8, 0), (16, 32, 2048, 32, 0),
    (1, 2048, 2048, 8, 0), (16, 64, 64, 8, 0)])
def test_parts_where_they_are_faster(batch, queries, keys, kv_heads, parts):
    """32 heads of 128 on 132 multiprocessors. 140 us in place of 36 for the first, 553 in place of 423 where heads share tiles alone; and
    31 us in place of 54 where keys were split in two that keep every multiprocessor busy as they are. Short prompts were not measured."""
    assert attention_sm90_config.key_parts(batch, queries, -(-keys // 128), 32, kv_heads, 128, 132) == parts


@pytest.mark.parametrize("heads", [1, 8, 32, 71, 256])
def test_no_more_parts_than_tiles_of_keys(heads):
    """A part without keys is work for nothing; groups larger than half a tile's rows keep their heads apart."""
    for key_tiles in (1, 2, 9, 500):
        assert 0 <= attention_sm90_config.key_parts(1, 20, key_tiles, heads, 1, 128, 132) <= (key_tiles if heads <= 64 else 0)
