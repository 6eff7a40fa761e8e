"""Where the family tests run: the same bodies on the CPU and, with -m gpu, on every CUDA device."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import pytest
import torch

FLOAT32 = pytest.param("cpu", torch.float32, id="cpu-float32")
GPU = [pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
       for dtype in (torch.float16, torch.bfloat16, torch.float32)]
SECOND_GPU = pytest.param("cuda:1", torch.float16, id="second_gpu", marks=[
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")])

ANYWHERE = [FLOAT32, pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"), *GPU, SECOND_GPU]
EVERYWHERE = pytest.mark.parametrize(("device", "dtype"), ANYWHERE)
# Tokens are compared one by one only where the dtype leaves no doubt about the largest logit.
IN_FLOAT32 = pytest.mark.parametrize(("device", "dtype"), [FLOAT32, GPU[-1]])


def in_turn(of: int, places: Sequence = (FLOAT32, GPU[-1]), **axes: Iterable) -> pytest.MarkDecorator:
    """On a GPU every combination of the axes' values; on a CPU one of each `of`, by the sum of the values' numbers: every value in turn."""
    chosen = []
    for (number, place), *numbered in product(enumerate(places), *map(enumerate, axes.values())):
        values = [value for _, value in numbered]
        if place.values[0] != "cpu" or (number + sum(number for number, _ in numbered)) % of == 0:
            chosen.append(pytest.param(*values, *place.values, id="-".join([*map(str, values), place.id]), marks=place.marks))
    return pytest.mark.parametrize((*axes, "device", "dtype"), chosen)
