"""Activations on the GPU, float32: silu, gelu, gelu_tanh, relu and quick_gelu from three device functions.

silu, gelu_tanh and quick_gelu are x * sigmoid(z) with z = x * (linear + cubic * x^2); which is meant travels as two numbers, so that a
kernel is compiled once for all kinds. gelu is max(x, 0) - |x| * Phi(-|x|): no cancellation, and more exact than
x / 2 * (1 + erf(x / sqrt 2)) (largest error 2.4e-7 against PyTorch's 9.6e-7 over 10^6 normal x).
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx

SIGMOID, GELU, RELU = 0, 1, 2
_LOG2_E, _TANH_GELU = 1.4426950408889634, 1.5957691216057308  # the second is 2 sqrt(2 / pi)
# kind: (form, -linear * log2(e), -cubic * log2(e)), the last three arguments of `activate`.
FORMS = {
    "silu": (SIGMOID, -_LOG2_E, 0.0),
    "gelu": (GELU, 0.0, 0.0),
    "gelu_tanh": (SIGMOID, -_TANH_GELU * _LOG2_E, -0.044715 * _TANH_GELU * _LOG2_E),
    "relu": (RELU, 0.0, 0.0),
    "quick_gelu": (SIGMOID, -1.702 * _LOG2_E, 0.0),
}
# Phi(-a) e^(a^2 / 2) as a polynomial without constant term in 1 / (1 + 0.279 a): least largest error of gelu, 6e-9, a fit of our own.
_RATIO = 0.279
_TAIL = (0.116990213, 0.0611264799, 0.285080756, -0.259713219, 0.404828048, -0.108312264)


@cuda.jit(device=True, forceinline=True)
def sigmoid_form(x, linear, cubic):
    square = ptx.minimum(x * x, np.float32(1e30))  # 0 * inf would make NaN of a large x
    return x * ptx.reciprocal(np.float32(1) + ptx.exp2(x * ptx.fma(cubic, square, linear)))


@cuda.jit(device=True, forceinline=True)
def gelu(x):
    size = abs(x)
    k = ptx.reciprocal(ptx.fma(np.float32(_RATIO), size, np.float32(1)))
    tail = ptx.fma(k, np.float32(_TAIL[5]), np.float32(_TAIL[4]))
    tail = ptx.fma(k, tail, np.float32(_TAIL[3]))
    tail = ptx.fma(k, tail, np.float32(_TAIL[2]))
    tail = ptx.fma(k, tail, np.float32(_TAIL[1]))
    tail = ptx.fma(k, tail, np.float32(_TAIL[0])) * k * ptx.exp2(x * x * np.float32(-0.5 * _LOG2_E))  # NaN stays NaN here
    # At infinity the tail is 0 and 0 * 32 gives infinity; at minus infinity the product is NaN, as PyTorch's.
    return ptx.fma(-ptx.maximum(-x, ptx.minimum(x, np.float32(32))), tail, ptx.maximum(x, np.float32(0)))


@cuda.jit(device=True, forceinline=True)
def relu(x):
    return np.float32(0) if x <= np.float32(0) else x  # keeps NaN, which max would drop


@functools.cache
def make_activate(count: int) -> Callable:
    """activate(values, form, linear, cubic): values[0:count] in place; form, linear and cubic are those of FORMS[kind]."""
    @cuda.jit(device=True, forceinline=True)
    def activate(values, form, linear, cubic):
        if form == SIGMOID:
            for i in range(count):
                values[i] = sigmoid_form(values[i], linear, cubic)
        elif form == GELU:
            for i in range(count):
                values[i] = gelu(values[i])
        else:
            for i in range(count):
                values[i] = relu(values[i])
    return activate
