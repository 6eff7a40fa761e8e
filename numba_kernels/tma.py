"""Tensor maps: what the bulk tensor copy engine of Hopper (TMA) must know of a tensor. A kernel takes them as parameters of letter t."""
from __future__ import annotations

import functools

import torch

_KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float8_e4m3fn: "UINT8", torch.int8: "UINT8"}


@functools.lru_cache(maxsize=4096)
def tiles(address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The 128 bytes of a map that copies boxes, innermost dimension first, to shared memory in rows of 64 or 128 bytes, swizzled.

    strides, in elements, belong to all dimensions but the innermost, which is dense. Addresses and strides are multiples of 16 bytes.
    Out of bounds reads give zeros. Cached, since encoding costs the host several microseconds. Raises RuntimeError.
    """
    from cuda.bindings import driver
    kind, swizzle = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    # A dimension of size 1 may come with any stride; none is taken, so one that is valid serves.
    steps = [dtype.itemsize * step if size > 1 else 16 for step, size in zip(strides, shape[1:], strict=True)]
    status, made = driver.cuTensorMapEncodeTiled(
        getattr(kind, f"CU_TENSOR_MAP_DATA_TYPE_{_KINDS[dtype]}"), len(shape), address,
        [driver.cuuint64_t(size) for size in shape], [driver.cuuint64_t(step) for step in steps], [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(shape), driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(swizzle, f"CU_TENSOR_MAP_SWIZZLE_{dtype.itemsize * box[0]}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B, driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"tensor map of {shape}, strides {strides}, box {box}: {status!r}")
    return b"".join(int(word).to_bytes(8, "little") for word in made.opaque)
