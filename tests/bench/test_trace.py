"""What the trace of a step says of kernels."""
from __future__ import annotations

from bench.trace import kind, table


def test_kernels_by_kind_and_the_time_between_them():
    ours = "_ZN5ftops13numba_kernels10decode_mma4make12_3clocals_3e10decode_mmaB3v32B108cw"
    kernels = [(ours, 0.0, 10e-6), ("nvjet_tst_64x8", 8e-6, 20e-6), (ours, 25e-6, 35e-6),
               ("void at::native::reduce_kernel<512>", 35e-6, 40e-6)]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(kernels, 2)[2:]]
    assert lines == [["ftops decode_mma", "1", "10.0", "50.0%"], ["cuBLAS", "0.5", "6.0", "30.0%"],
                     ["PyTorch, reductions", "0.5", "2.5", "12.5%"], ["nothing runs", "", "2.5", "12.5%"], ["a step", "2", "20.0", ""]]
    assert kind("some_other_kernel") == "some_other_kernel"
