"""A token that attention will remember wrongly: what rotary_append leaves in the caches, against separate norm, rotation and write."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.op import DTYPES
from ftops.ops.rotary_append import cases
from tests.accuracy import assert_accurate, in_float64
from tests.ops.calls import DTYPE_IDS
from tests.ops.oracles import append_kv_slots, assert_appended, decode_attention, normed_and_rotated

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}") for case in cases() for dtype in DTYPES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_what_is_kept(case, dtype, device):
    args, kwargs = case.make(torch.device(device), dtype)
    q, k, v, k_cache, v_cache, positions, freqs = args
    for cache in (k_cache, v_cache):
        cache.fill_(7)
    before = [t.clone() for t in (k_cache, v_cache, q, k, v, positions)]
    ftops.ops.rotary_append(*args, **kwargs)
    table, k_scale = kwargs.get("page_table"), kwargs.get("k_scale")
    assert_appended(v, v_cache, before[1], positions, table, kwargs.get("v_scale"))
    assert all(torch.equal(now, then) for now, then in zip((q, k, v, positions), before[2:], strict=True))

    slots = append_kv_slots(k, k_cache, positions, table)
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool, device=k.device)
    if slots:
        (rows, tokens), places = (torch.tensor(index, device=k.device).T for index in zip(*slots, strict=True))
        untouched[tuple(places)] = False
        exact = normed_and_rotated(*in_float64((q, k, positions, freqs)), **in_float64(kwargs))[1][rows, tokens]
        torchs = normed_and_rotated(q, k, positions, freqs, **kwargs)[1][rows, tokens]
        stored = k_cache[tuple(places)]
        if k_scale is None:
            assert_accurate(stored, exact, torchs)
        else:
            limit, off = 127 if k_cache.dtype is torch.int8 else 448, (torchs.double() - exact).abs().max()
            if k_scale.dim() == 3:
                k_scale = k_scale[tuple(places)]
                assert ((k_scale * limit - exact.abs().amax(-1)).abs() <= 2 * off + 1e-5 * k_scale * limit).all()
            wanted = exact / k_scale.double()[..., None]
            half_step = 0.5 if limit == 127 else (wanted.abs() / 16).clamp(min=2 ** -10)
            off = 2 * off / k_scale.min() + 1e-5 * wanted.abs()
            assert ((stored.double() - wanted.clamp(-limit, limit)).abs() <= half_step + off).all()
    assert torch.equal(k_cache.double()[untouched], before[0].double()[untouched])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_steps_of_decoding(dtype, device):
    """A prompt and then single tokens, each rotary_append and decode_attention: what one attention over all of them gives."""
    q, k, v = (torch.randn(2, 12, heads, 64, device=device).to(dtype) for heads in (4, 2, 2))
    inv_freq = 10000.0 ** (-torch.arange(32, device=device) / 32)
    norms = {name: torch.randn(64, device=device).to(dtype) for name in ("q_norm", "k_norm")}
    caches = [torch.full((2, 16, 2, 64), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    steps = []
    for first, new in ((0, 7), (7, 1), (8, 4)):
        positions, tokens = torch.arange(first, first + new, device=device).expand(2, new), slice(first, first + new)
        turned = ftops.ops.rotary_append(q[:, tokens], k[:, tokens], v[:, tokens], *caches, positions, inv_freq, **norms)
        steps.append(ftops.ops.decode_attention(turned, *caches, torch.full((2,), first + new, dtype=torch.int32, device=device)))
    positions, lengths = torch.arange(12, device=device).expand(2, 12), torch.full((2,), 12, device=device)

    def whole(q, k, v, inv_freq, **norms):
        q, k = normed_and_rotated(q, k, positions, inv_freq, **norms)
        return decode_attention(q, k, v, lengths)

    assert_accurate(torch.cat(steps, 1), whole(*in_float64((q, k, v, inv_freq)), **in_float64(norms)), whole(q, k, v, inv_freq, **norms))
