"""What each op must compute, written apart from ftops with PyTorch's and Hugging Face's own formulas.

An oracle takes the public function's arguments and computes in their dtype: in float64 it is the truth, in the op's dtype it is
the PyTorch that the op is compared with.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.ops.oracle_sample import sample


def rms_norm(x, weight, eps, *, residual=None, offset=0.0):
    total = x if residual is None else x + residual
    y = F.rms_norm(total, (x.shape[-1],), weight + offset, eps)
    return y if residual is None else (y, total)


def layer_norm(x, weight, bias, eps, *, residual=None, return_sum=True):
    total = x if residual is None else x + residual
    y = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return y if residual is None or not return_sum else (y, total)


def _rotate_half(x):
    """transformers.models.llama.modeling_llama.rotate_half"""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2:]
    return torch.cat((-x2, x1), dim=-1)


def _rotate_every_two(x):
    """transformers.models.gptj.modeling_gptj.rotate_every_two"""
    x1, x2 = x[:, :, :, ::2], x[:, :, :, 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def rotary(q, k, positions, freqs, *, interleaved=False, rotary_dim=None):
    size = q.shape[-1] if rotary_dim is None else rotary_dim
    if isinstance(freqs, torch.Tensor):
        angle = positions[..., None].to(freqs.dtype) * freqs
        cos, sin = angle.cos(), angle.sin()
    else:
        cos, sin = (table if positions is None else table[positions] for table in freqs)
    if cos.shape[-1] == size // 2:
        cos, sin = ((t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)) for t in (cos, sin))
    cos, sin = cos.unsqueeze(2).to(q.dtype), sin.unsqueeze(2).to(q.dtype)
    turn = _rotate_every_two if interleaved else _rotate_half
    return tuple(torch.cat((x[..., :size] * cos + turn(x[..., :size]) * sin, x[..., size:]), -1) for x in (q, k))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3))),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def gated_activation(x, kind):
    half = x.shape[-1] // 2
    return ACTIVATIONS[kind](x[..., :half]) * x[..., half:]


def bias_activation(x, bias, kind):
    return ACTIVATIONS[kind](x if bias is None else x + bias)


GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "quick_geglu": "quick_gelu"}


def linear(x, weight, bias=None, *, activation=None, residual=None, norm=None, eps=1e-6):
    y = (x if norm is None else rms_norm(x, norm, eps)) @ weight.T
    y = y if bias is None else y + bias
    if activation in GATED:
        y = gated_activation(y, GATED[activation])
    elif activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def linear_w4a16(x, packed, scales, shape, bias=None, **options):
    """Each value looked up where the layout of packing.py puts it."""
    n, k = (torch.arange(size, device=x.device) for size in shape)
    (i, h, g), (piece, t, s, c, e) = _rows_of_a_tile(n), _places_of_k(k)
    word = packed[(n // 32)[:, None], piece, 4 * g[:, None] + t, 2 * i[:, None] + s]
    q = (word >> (4 * (2 * c + h[:, None]) + 16 * e)) & 15
    per_group = 32 * packed.shape[1] // scales.shape[1]
    by_group = scales[(n // 32)[:, None], k // per_group, g[:, None], (2 * i + h)[:, None]]
    weight = (q - 8) * by_group if scales.dim() == 4 else (q - by_group[..., 1]) * by_group[..., 0]
    return linear(x, weight.to(x.dtype), bias, **options)


def linear_w8a16(x, values, scales, bias=None, **options):
    return linear(x, (values[:, :x.shape[-1]].double() * scales.double()[:, None]).to(x.dtype), bias, **options)


def linear_fp8(x, values, scales, bias=None, **options):
    x, options = _normed(x, **options)
    weight = (values[:, :x.shape[-1]].double() * scales.double()[:, None]).to(x.dtype)
    return linear(_in_eight_bits(x, 448, lambda x: x.to(torch.float8_e4m3fn).float()), weight, bias, **options)


def linear_w8a8(x, values, scales, smooth=None, bias=None, **options):
    x, options = _normed(x, **options)
    x = x if smooth is None else (x / smooth).to(x.dtype)
    return linear_w8a16(_in_eight_bits(x, 127, torch.round), values, scales, bias, **options)


def _normed(x, norm=None, eps=1e-6, **options):
    """What is rounded to eight bits, and the other options."""
    return (x if norm is None else rms_norm(x, norm, eps)), options


def _in_eight_bits(x, largest, rounded):
    """In 16 bits on a GPU, more than 64 rows are compared with what rounding x to eight bits costs."""
    if not x.is_cuda or x.element_size() > 2 or x.numel() <= 64 * x.shape[-1]:
        return x
    scale = x.abs().amax(-1, keepdim=True).float() / largest
    return (rounded(x / scale) * scale).to(x.dtype)


def _rows_of_a_tile(n):
    return n % 32 // 16, n % 16 // 8, n % 8


def _places_of_k(k):
    return k // 32, k % 32 // 8, k % 8 // 4, k % 4 // 2, k % 2


def attention(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, bias=None, alibi_slopes=None, kv_lengths=None):
    """In float64 scaled_dot_product_attention itself, unless there is a softcap, which it lacks."""
    batch, queries, heads, dim = q.shape
    keys, group = k.shape[1], q.shape[2] // k.shape[2]
    place = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=q.device)[None, :]
    added = torch.zeros(batch, heads, queries, keys, dtype=q.dtype, device=q.device)
    if bias is not None:
        added = added + bias
    if alibi_slopes is not None:
        added = added - alibi_slopes.to(q.dtype)[:, None, None] * (place - key).abs()
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (key > place)
    if window is not None and window[0] != -1:
        hidden = hidden | (key < place - window[0])
    if window is not None and window[1] != -1:
        hidden = hidden | (key > place + window[1])
    if kv_lengths is not None:
        unused = key >= kv_lengths[:, None]
        hidden = hidden | unused[:, None, None, :]
        k, v = (torch.where(unused[:, :, None, None], 0, t) for t in (k, v))
    added = added.masked_fill(hidden, float("-inf"))
    scale = dim ** -0.5 if scale is None else scale
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.dtype is torch.float64 and not softcap and q.numel() and k.numel():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=True).transpose(1, 2)
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + added
    weights = torch.softmax(scores, -1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return (torch.where(empty, 0, weights).to(v.dtype) @ v.repeat_interleave(group, 1)).transpose(1, 2)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, **options):
    out = torch.full_like(q, float("nan"))
    starts_q, starts_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_kv[i], starts_kv[i + 1])
        assert rows.stop - rows.start <= max_seqlen_q
        assert keys.stop - keys.start <= max_seqlen_kv
        out[rows] = attention(q[None, rows], k[None, keys], v[None, keys], **options)[0]
    return out


def attention_fp8(q, k, v, q_scale, k_scale, v_scale, *, scale=None, **options):
    """In float64 exact; else in float32 with what e4m3 takes from the weights: the worst of eight places for the highest of a row, all
    of them numbers of e4m3. A kernel does not know the highest when it begins, and one place is a matter of luck: in 12 draws of q, k and
    v[2,257,4,128] the error of our codes was 0.5 to 1.07 of what is allowed where the highest is 8, 0.5 to 0.94 with the worst of these.
    """
    wide = q_scale.dtype
    exact = wide is torch.float64
    q, k, v = (t.to(wide) * s[:, None] for t, s in ((q, q_scale), (k, k_scale), (v, v_scale)))
    if exact or not q.numel() or not k.numel():
        return attention(q, k, v, scale=scale, **options).to(wide if exact else torch.bfloat16)
    ones = torch.eye(k.shape[1], device=q.device, dtype=wide)[None, :, None].expand(k.shape[0], -1, k.shape[2], -1)
    weights = attention(q, k, ones, scale=q.shape[3] ** -0.5 if scale is None else scale, **options).transpose(1, 2)
    weights = weights / weights.amax(-1, keepdim=True).clamp(min=1e-30)
    values = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
    places = torch.stack([(weights * highest).to(torch.float8_e4m3fn).to(wide) / highest @ values for highest in range(8, 16)])
    worst = places.gather(0, (places - weights @ values).abs().argmax(0, keepdim=True))[0]
    return (worst / weights.sum(-1, keepdim=True).clamp(min=1e-30)).transpose(1, 2).to(torch.bfloat16)


def decode_attention(q, k_cache, v_cache, lengths, *, page_table=None, window=None, bias=None, k_scale=None, v_scale=None, fixed_split=None,
                     **options):
    """Row by row: the plain attention of the row's T last tokens over the row's first lengths[b] tokens, however they are split."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        k, v = (_row(cache, b, page_table)[:length].to(q.dtype) for cache in (k_cache, v_cache))
        if k_scale is not None:
            k, v = (x * (scale if scale.dim() == 1 else _row(scale, b, page_table)[:length])[..., None].to(q.dtype)
                    for x, scale in ((k, k_scale), (v, v_scale)))
        if bias is not None:
            full = torch.broadcast_to(bias, (*q.shape[:1], q.shape[2], q.shape[1], bias.shape[-1]))
            options["bias"] = full[b:b + 1, ..., :length]
        out[b:b + 1] = attention(q[b:b + 1], k[None], v[None], causal=True, window=None if window is None else (window, -1), **options)
    return out


def _row(cache, b, page_table):
    if page_table is None:
        return cache[b]
    return torch.cat([cache[page] for page in page_table[b].tolist()])


def append_kv_slots(k, k_cache, positions, page_table):
    """Where append_kv writes: a list of (index into k[B,T], index into the cache's first two dimensions)."""
    slots = []
    for b, row in enumerate(positions.tolist()):
        for t, position in enumerate(row):
            if page_table is None:
                place, capacity = (b, position), k_cache.shape[1]
            else:
                size, pages = k_cache.shape[1], page_table[b].tolist()
                capacity = size * len(pages)
                place = (pages[position // size], position % size) if 0 <= position < capacity else None
            if 0 <= position < capacity:
                slots.append(((b, t), place))
    return slots


def assert_appended(k, k_cache, before, positions, page_table, scale):
    """k_cache is `before` with k at its slots: bit for bit, or in 8 bits no farther from k than the nearest representable value.

    Scales of tokens are those with which the largest value of a head is the largest that there is."""
    slots = append_kv_slots(k, k_cache, positions, page_table)
    untouched = torch.ones(k_cache.shape[:2], dtype=torch.bool, device=k.device)
    if slots:
        (rows, tokens), (pages, places) = (torch.tensor(index, device=k.device).T for index in zip(*slots, strict=True))
        untouched[pages, places] = False
        wanted, stored = k[rows, tokens].double(), k_cache.double()[pages, places]
        if scale is None:
            assert torch.equal(stored, wanted)
        else:
            if scale.dim() == 3:
                scale = scale[pages, places]
                measured = wanted.abs().amax(-1) / (127 if k_cache.dtype is torch.int8 else 448)
                torch.testing.assert_close(scale.double(), measured, rtol=1e-6, atol=0)
            wanted = wanted / scale.double()[..., None]
            if k_cache.dtype is torch.int8:
                wanted = wanted.clamp(-127, 127)
                nearest = wanted.round()
            else:
                wanted = wanted.clamp(-448, 448)
                nearest = wanted.float().to(k_cache.dtype).double()
            # 1e-6 of slack: k / scale rounds to float32 before it is rounded to 8 bits.
            assert ((stored - wanted).abs() <= (nearest - wanted).abs() + 1e-6 * wanted.abs() + 1e-6).all()
    assert torch.equal(k_cache.double()[untouched], before.double()[untouched])


def rotary_append(q, k, v, k_cache, v_cache, positions, freqs, **options):
    """What is returned."""
    return normed_and_rotated(q, k, positions, freqs, **options)[0]


def normed_and_rotated(q, k, positions, freqs, *, rotary_positions=None, q_norm=None, k_norm=None, eps=1e-6, norm_offset=0.0,
                       interleaved=False, rotary_dim=None, **of_the_cache):
    q, k = (x if weight is None else rms_norm(x, weight, eps, offset=norm_offset) for x, weight in ((q, q_norm), (k, k_norm)))
    where = positions if rotary_positions is None else rotary_positions
    if isinstance(freqs, tuple):
        where = None if freqs[0].dim() == 3 else where.clamp(0, len(freqs[0]) - 1)
    return rotary(q, k, where, freqs, interleaved=interleaved, rotary_dim=rotary_dim)


ORACLES = {
    "rms_norm": rms_norm, "layer_norm": layer_norm, "rotary": rotary, "gated_activation": gated_activation,
    "bias_activation": bias_activation, "linear": linear, "linear_w4a16": linear_w4a16, "linear_w8a16": linear_w8a16,
    "linear_fp8": linear_fp8, "linear_w8a8": linear_w8a8,
    "attention": attention, "attention_varlen": attention_varlen, "attention_fp8": attention_fp8, "decode_attention": decode_attention,
    "sample": sample, "rotary_append": rotary_append,
}
