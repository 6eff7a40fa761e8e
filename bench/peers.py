"""Peers that are timed where they are installed and are nowhere required: FlashInfer, gemlite and torchao."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bench.problem import DTYPE, Run

WORKSPACE = 128 * 2 ** 20  # bytes, as FlashInfer's documentation advises
PAGE = 16  # keys a page, by which FlashInfer is given a cache that has no pages
HOPPER = 9, 0


def installed(name: str) -> bool:
    return torch.cuda.is_available() and find_spec(name) is not None


def built(build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What build() gives, or something that raises its error when called: then the peer is missing, with its reason, not the problem."""
    try:
        return build()
    except Exception as error:
        reason = error

        def cannot(*_: Any) -> Any:
            raise reason
        return cannot


@cache
def workspace(device: torch.device) -> torch.Tensor:
    """Of all FlashInfer's wrappers: they run one after the other."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def flashinfer_prefill(lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, causal: bool,
                       dtype: torch.dtype = DTYPE) -> Callable[..., torch.Tensor]:
    """Attention of q [T,H,D], k and v [T,Hkv,D], sequences of `lengths` one behind the other; planned on the first call.

    In float8_e4m3fn their scales, [H] and [Hkv], are given behind them.
    """
    @cache
    def planned(device: torch.device) -> Any:
        import flashinfer
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(device))
        starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        wrapper.plan(starts, starts, heads, kv_heads, head_dim, causal=causal, q_data_type=dtype, kv_data_type=dtype, o_data_type=DTYPE)
        return wrapper

    return lambda q, *others: planned(q.device).run(q, *others)


def flashinfer_decode(batch: int, heads: int, kv_heads: int, context: int, head_dim: int, page_size: int | None,
                      dtype: torch.dtype, scale: float | None) -> dict[str, Run]:
    """Of the caches that ours reads, by its kernel for CUDA cores and by that for tensor cores.

    A plan holds the page table, so all sets of inputs must have the same. `scale` is that of keys and values in 8 bits.
    """
    if not installed("flashinfer"):
        return {}
    size = page_size or PAGE

    def side(tensor_cores: bool) -> Run:
        wrappers: dict[torch.device, Any] = {}

        def plan(i: SimpleNamespace) -> Any:
            import flashinfer
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(i.q.device), use_tensor_cores=tensor_cores)
            pages = batch * context // size
            table = i.options["page_table"].flatten() if page_size else torch.arange(pages, dtype=torch.int32, device=i.q.device)
            starts, last = torch.arange(0, pages + 1, context // size, dtype=torch.int32), torch.full((batch,), size, dtype=torch.int32)
            wrapper.plan(starts, table, last, heads, kv_heads, head_dim, size, q_data_type=DTYPE, kv_data_type=dtype)
            return wrapper

        def run(i: SimpleNamespace) -> torch.Tensor:
            if i.q.device not in wrappers:
                wrappers[i.q.device] = plan(i)
            pages = tuple(cache.view(-1, size, kv_heads, head_dim) for cache in i.caches)
            return wrappers[i.q.device].run(i.q.squeeze(1), pages, k_scale=scale, v_scale=scale).unsqueeze(1)
        return run

    return {"FlashInfer": side(False), "FlashInfer, tensor cores": side(True)}


@cache
def _gemlite() -> Any:
    """gemlite with the tiles that it comes tuned with: it looks for them by the device's name, which is not that of every Hopper GPU."""
    import gemlite
    if torch.cuda.get_device_capability() == HOPPER:
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))
    return gemlite.helper


def gemlite_int4(values: torch.Tensor, scales: torch.Tensor) -> Run:
    """Of 4-bit values [N,K] in uint8, of which 8 is zero, and scales [N,groups]."""
    return _gemlite().A16W4_HQQ_INT(values.device, DTYPE).from_weights(values, scales, torch.full_like(scales, 8))


def gemlite_w8a8(values: torch.Tensor, scales: torch.Tensor) -> Run:
    """Of int8 values [N,K] and scales [N]; activations are quantised in the call, by the row."""
    return _gemlite().A8W8_int8_dynamic(values.device, DTYPE).from_weights(values, scales=scales)


def compiled_linear() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """F.linear as torchao asks to compile it: `recommended_inductor_config_setter`, without setting it for the whole process."""
    return torch.compile(lambda x, weight: F.linear(x, weight), fullgraph=True, dynamic=False,
                         options={"coordinate_descent_tuning": True, "coordinate_descent_check_all_directions": True})


def torchao_int8(values: torch.Tensor, scales: torch.Tensor) -> Callable[..., torch.Tensor]:
    """(x, linear) -> linear(x, weight), by the weight that torchao's Int8WeightOnlyConfig makes, of int8 values [N,K] and scales [N]."""
    from torchao.quantization import Int8Tensor
    weight = Int8Tensor(values, scales[:, None], [1, values.shape[1]], DTYPE)
    return lambda x, linear: linear(x, weight)
