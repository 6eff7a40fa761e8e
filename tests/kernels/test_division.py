"""A key that is read from another page, a row from another head: kernels divide by multiplying."""
from __future__ import annotations

import random

import pytest

from ftops.numba_kernels.division import inverse

LARGEST = 2 ** 31 - 1


def quotient(n: int, by: int) -> int:
    """`division.divide`, which a GPU computes."""
    return (n * (by & 0xFFFFFFFF)) >> (by >> 32)


@pytest.mark.parametrize("divisor", [*range(1, 300), 1000, 4095, 4096, 4097, 65535, 65537, 2 ** 20 - 1, 2 ** 30 - 1, 2 ** 30 + 1, LARGEST])
def test_quotients_are_exact(divisor):
    by, draw = inverse(divisor), random.Random(divisor)
    edges = [k * divisor + off for k in (0, 1, 2, LARGEST // divisor // 2, LARGEST // divisor) for off in (-1, 0, 1)]
    for n in (*edges, LARGEST, *(draw.randrange(LARGEST) for _ in range(200))):
        if 0 <= n <= LARGEST:
            assert quotient(n, by) == n // divisor
