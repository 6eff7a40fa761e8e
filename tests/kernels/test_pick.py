"""A size that no compiled kernel serves: each `pick` is asked for every kind of problem and must name a variant that is listed."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ftops.numba_kernels import (
    KERNELS,
    attention_mma,
    attention_plain,
    attention_sm90,
    attention_sm90_config,
    bias_activation,
    decode_mma,
    dequantise,
    elementwise,
    gated_activation,
    layer_norm,
    linear,
    linear_sm90,
    linear_sm90_config,
    linear_w4a16,
    quantise_rows,
    rms_norm,
    rotary,
    rotary_append,
    row_tile,
    sample,
    scale_product,
    variants_of,
)
from ftops.numba_kernels.compile import Spec
from ftops.numba_kernels.rows import DTYPES, ITEM, widest
from ftops.ops.candidates import _fitting

LENGTHS = sorted({*range(1, 300), *(base * factor + more for base in (128, 768, 1000, 1024, 5120) for factor in (1, 2, 3, 4, 8, 16, 33)
                                    for more in (-1, 0, 1)), 2**17, 2**20 + 8, 2**31, 2**31 + 1})
HALVES = ("float16", "bfloat16")


def rows() -> Iterator[tuple[str, int, int]]:
    """(dtype, row length, elements an access): 16-byte accesses only where the length allows them."""
    for dtype in DTYPES:
        item = ITEM[dtype]
        for length in LENGTHS:
            yield dtype, length, 1
            if widest(item, length * item) > 1:
                yield dtype, length, 16 // item


def picked(name: str) -> Iterator[Spec]:
    """What `pick` of a kernel gives for every kind of problem."""
    if name in ("rms_norm", "layer_norm"):
        module = {"rms_norm": rms_norm, "layer_norm": layer_norm}[name]
        yield from (module.spec(row_tile.pick(*problem)) for problem in rows())
    elif name in ("bias_activation", "gated_activation"):
        module = {"bias_activation": bias_activation, "gated_activation": gated_activation}[name]
        yield from (module.spec(elementwise.pick(dtype, vec, module.INPUTS)) for dtype, _, vec in rows())
    elif name == "rotary":
        yield from (rotary.spec(rotary.pick(dtype, vec, interleaved)) for dtype, _, vec in rows() for interleaved in (False, True))
    elif name == "linear":
        yield from (linear.spec(linear.pick(kind, dtype, rows)) for kind in linear.BATCHES for dtype in HALVES for rows in range(1, 100))
        yield from (linear.spec(replace(linear.pick(kind, "bfloat16", rows), normed=True)) for kind in linear.BATCHES
                    for rows in range(1, linear.NORM_ROWS + 1))
    elif name == "linear_sm90":
        yield from (linear_sm90.spec(linear_sm90_config.pick(kind, dtype, rows, features, depth, multiprocessors).config)
                    for kind in linear_sm90_config.COLUMNS for dtype in HALVES for rows in (17, 32, 64, 65, 128, 256, 257, 1024, 2048, 8192)
                    for features, depth in ((6144, 4096), (28672, 4096), (4096, 14336), (1, 8)) for multiprocessors in (132, 78))
    elif name == "rotary_append":
        yield from (rotary_append.spec(rotary_append.Config(dtype, vec, tokens)) for dtype, _, vec in rows() for tokens in (False, True))
    elif name == "sample":
        yield from (sample.spec(sample.pick(dtype, vec)) for dtype, _, vec in rows())
    elif name == "dequantise":
        yield from (dequantise.spec(dequantise.Config(dtype)) for dtype in HALVES)
    elif name == "scale_product":
        yield from (scale_product.spec(scale_product.Config(dtype)) for dtype in HALVES)
    elif name == "quantise_rows":
        yield from (quantise_rows.spec(quantise_rows.pick(dtype, narrow, length)) for dtype in HALVES for narrow in quantise_rows.LARGEST
                    for length in LENGTHS)
    elif name == "linear_w4a16":
        yield from (linear_w4a16.spec(linear_w4a16.pick(dtype, rows, size)) for dtype in HALVES for rows in range(1, 100)
                    for size in (32, 64, 128))
        yield from (linear_w4a16.spec(replace(linear_w4a16.pick("bfloat16", rows, size), normed=True))
                    for rows in range(1, linear_w4a16.NORM_ROWS + 1) for size in (32, 64, 128))
    elif name == "attention":
        yield from (attention_plain.spec(attention_plain.pick(dim)) for dim in range(1, 257))
        for module, config in ((attention_mma, attention_mma), (attention_sm90, attention_sm90_config)):
            yield from (module.spec(config.pick(dtype, next(d for d in config.HEAD_DIMS if d >= dim), extras))
                        for dtype in HALVES for dim in range(1, 257) for extras in (False, True))
        yield from (attention_sm90.spec(attention_sm90_config.pick(dtype, dim, extras, True)) for dtype in HALVES
                    for dim in attention_sm90_config.HEAD_DIMS for extras in (False, True))
        yield from (attention_sm90.spec(attention_sm90_config.pick_parts(dtype, dim)) for dtype in HALVES for dim in range(1, 257))
    elif name == "decode_attention":
        yield from (decode_mma.spec(decode_mma.pick(dtype, cache, dim, queries)) for dtype in HALVES
                    for cache in ("16-bit", "int8", "float8_e4m3fn") for dim in range(1, 257) for queries in range(1, 129))
        yield from (decode_mma.spec(decode_mma.pick("bfloat16", cache, dim, queries, True)) for cache in ("int8", "float8_e4m3fn")
                    for dim in range(1, 257) for queries in range(1, 129))
    else:
        raise AssertionError(f"say here which problems {name} is asked for")


@pytest.mark.parametrize("name", KERNELS)
def test_every_problem_has_a_listed_variant(name):
    listed = set(variants_of(name))
    assert [spec.name for spec in set(picked(name)) if spec not in listed] == []


@pytest.mark.parametrize("name", [
    "rms_norm", "layer_norm", "bias_activation", "gated_activation", "rotary", "rotary_append", "linear", "linear_sm90",
    "linear_w4a16", "quantise_rows", "sample"])
def test_every_listed_variant_is_for_some_problem(name):
    """A variant that is never asked for costs compile time on every machine."""
    assert [spec.name for spec in variants_of(name) if spec not in set(picked(name))] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_fits_its_tile(dtype):
    """A variant that reads the row once must hold all of it, or the rest is neither summed nor written."""
    for _, length, vec in (problem for problem in rows() if problem[0] == dtype):
        config = row_tile.pick(dtype, length, vec)
        assert (config.dtype, config.vec) == (dtype, vec)
        assert config.reread or config.accesses * config.threads * vec >= length
        assert (config.threads * config.rows) % 32 == 0
        assert config.rows == 1 or config.threads <= 32  # a block-wide sum serves one row


@pytest.mark.parametrize("vec", [1, 4, 8])
def test_tiles_cover_a_row_with_few_threads_idle(vec):
    for length in LENGTHS:
        shift, tiles = elementwise.tiling(length, vec)
        accesses = -(-length // vec)
        covered = tiles << shift
        assert covered - (1 << shift) < accesses <= covered
        assert 1 << shift <= elementwise.THREADS
        assert accesses / covered >= (0.875 if accesses >= 64 else 0.5)


def test_blocks_cover_the_rows():
    for count in (1, 2, 31, 32, 33, 1000, 65537, 2**31):
        for shift in range(9):
            for most in (1, 2, 4, 8):
                blocks, each = elementwise.blocks(count, shift, 3, most, 132)
                assert blocks % 3 == 0
                taken = blocks // 3 * each * (elementwise.THREADS >> shift)
                assert taken - each * (elementwise.THREADS >> shift) < count <= taken
                assert each == most or (each == 1 and blocks <= 132)


def test_widest_access():
    assert widest(2, 0) == 8 and widest(4, 32) == 4 and widest(2, 16) == 8
    assert widest(2, 18) == widest(2, 8) == widest(4, 4) == 1


@pytest.mark.parametrize("most", [99 * 1024, 163 * 1024, 227 * 1024])
def test_what_is_tuned_has_room_for_a_norm(most, monkeypatch):
    """`ftops tune` measures without one: what wins must not fail to launch with it. What is taken unmeasured is among what it measures."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=most))
    offers = [linear.candidates(kind, "bfloat16", rows) for kind in linear.BATCHES for rows in (8, 16)]
    offers += [linear_w4a16.candidates("bfloat16", 8, size) for size in (64, 128)]
    for offer in offers:
        fitting = _fitting(offer, torch.device("cuda"))
        assert next(iter(fitting)) == next(iter(offer))
        assert all(replace(config, normed=True).shared_bytes <= most for config in fitting.values())
