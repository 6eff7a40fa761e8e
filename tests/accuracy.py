"""When a result counts as right: FlashAttention's rule, which measures against what PyTorch itself loses at the same dtype."""
from __future__ import annotations

import torch

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def assert_accurate(ours: Tensors, exact: Tensors, pytorch: Tensors) -> None:
    """max|ours - exact| <= 2 max|pytorch - exact| + 2 max|(exact + 0.3 - 0.3) - exact|, the last at the dtype of `ours`.

    exact: computed in float64 from the same inputs. pytorch: computed by PyTorch in the dtype of `ours`.
    """
    if isinstance(ours, tuple):
        assert len(ours) == len(exact) == len(pytorch)
        for one in zip(ours, exact, pytorch, strict=True):
            assert_accurate(*one)
        return
    assert ours.shape == exact.shape
    assert ours.dtype is pytorch.dtype
    if not ours.numel():
        return
    rounded = exact.to(ours.dtype)
    noise = ((rounded + 0.3 - 0.3) - rounded).abs().max().double()
    error, allowed = (ours.double() - exact).abs(), 2 * (pytorch.double() - exact).abs().max() + 2 * noise
    worst = error.max()
    if not worst <= allowed:  # "not <=", so that NaN fails
        where = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
        raise AssertionError(f"error {worst:.3g} > {allowed:.3g} allowed at {where}: {ours[where]} instead of {exact[where]}; "
                             f"{int((~(error <= allowed)).sum())} of {error.numel()} elements are beyond")


def in_float64(value: object) -> object:
    """The arguments of a call with every floating tensor widened; 8-bit caches stay as they are, being exact already."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() > 1:
        return value.double()
    if isinstance(value, (tuple, list)):
        return type(value)(in_float64(item) for item in value)
    if isinstance(value, dict):
        return {key: in_float64(item) for key, item in value.items()}
    return value
