"""PTX of Hopper alone (sm_90a), as Numba intrinsics: barriers in shared memory, the bulk tensor copy engine, warpgroup matrix products."""
from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from llvmlite.ir.values import ArgumentAttributes
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

from ftops.numba_kernels.ptx import KIND, ptx, ptx_accumulate

mbarrier_init = ptx("mbarrier_init", "mbarrier.init.shared::cta.b64 [$0], $1;", "", "rr")
# Arrives, and announces $1 bytes.
mbarrier_expect = ptx("mbarrier_expect", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "", "rr")
mbarrier_arrive = ptx("mbarrier_arrive", "mbarrier.arrive.shared::cta.b64 _, [$0];", "", "r")
# Until the phase of parity $1 is complete. The braces give every inlined copy its own labels.
mbarrier_wait = ptx("mbarrier_wait", "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @p bra DONE; "
                    "bra WAIT; DONE: }", "", "rr")
atomic_add_u32 = ptx("atomic_add_u32", "atom.add.u32 $0, [$1], $2;", "r", "lr")  # the value before
fence_mbarrier_init = ptx("fence_mbarrier_init", "fence.mbarrier_init.release.cluster;")
fence_proxy_async = ptx("fence_proxy_async", "fence.proxy.async.shared::cta;")  # ordinary stores before it, wgmma and TMA after it
bar_sync = ptx("bar_sync", "bar.sync $0, $1;", "", "rr")  # named barrier $0 of $1 threads
bar_arrive = ptx("bar_arrive", "bar.arrive $0, $1;", "", "rr")
# Whether $2 is not 0 in any of the $1 threads that meet at named barrier $0.
bar_any = ptx("bar_any", "{ .reg .pred p, q; setp.ne.u32 p, $3, 0; barrier.cta.red.or.pred q, $1, $2, p; selp.u32 $0, 1, 0, q; }", "r",
              "rrr")
# All threads of a cluster: what each has written to shared memory is there for the others after the wait.
cluster_arrive = ptx("cluster_arrive", "barrier.cluster.arrive.release;")
cluster_arrive_relaxed = ptx("cluster_arrive_relaxed", "barrier.cluster.arrive.relaxed;")  # of who has written nothing that others read
cluster_wait = ptx("cluster_wait", "barrier.cluster.wait.acquire;")
# At the address $4 of block $5 of the cluster.
ld_cluster_f32x4 = ptx("ld_cluster_f32x4", "{ .reg .b32 a; mapa.shared::cluster.u32 a, $4, $5; "
                       "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [a]; }", "ffff", "rr")
ld_written_64_if = ptx("ld_written_64_if", "{ .reg .pred p; .reg .b32 t<2>; setp.ne.u32 p, $3, 0; mov.b32 t0, 0; mov.b32 t1, 0; "
                       "@p ld.global.v2.b32 {t0, t1}, [$2]; mov.b32 $0, t0; mov.b32 $1, t1; }", "rr", "lr")
prefetch_tensor_map = ptx("prefetch_tensor_map", "prefetch.tensormap [$0];", "", "l")
# A box of map $1 at coordinates from $3 on, innermost first, to shared memory $0; mbarrier $2 counts its bytes. Out of bounds are zeros.
tma_load_2d = ptx("tma_load_2d", "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                  "[$0], [$1, {$3, $4}], [$2];", "", "rlrrr")
tma_load_4d = ptx("tma_load_4d", "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                  "[$0], [$1, {$3, $4, $5, $6}], [$2];", "", "rlrrrrr")
# A box of shared memory $1 to map $0, but what is out of bounds. Stores of a thread are counted in groups.
tma_store_2d = ptx("tma_store_2d", "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [$0, {$2, $3}], [$1];", "", "lrrr")
bulk_commit = ptx("bulk_commit", "cp.async.bulk.commit_group;")
# Until all but the last n groups have read shared memory.
BULK_WAIT_READ = {n: ptx(f"bulk_wait_read_{n}", f"cp.async.bulk.wait_group.read {n};") for n in range(2)}
# The same box into L2.
tma_prefetch_4d = ptx("tma_prefetch_4d", "cp.async.bulk.prefetch.tensor.4d.L2.global [$0, {$1, $2, $3, $4}];", "", "lrrrr")
SETMAXNREG = {(way, n): ptx(f"setmaxnreg_{way}_{n}", f"setmaxnreg.{way}.sync.aligned.u32 {n};")
              for way, counts in (("dec", (24, 32, 40, 56)), ("inc", (152, 160, 224, 232, 240))) for n in counts}
wgmma_fence = ptx("wgmma_fence", "wgmma.fence.sync.aligned;")
wgmma_commit = ptx("wgmma_commit", "wgmma.commit_group.sync.aligned;")
WGMMA_WAIT = {n: ptx(f"wgmma_wait_{n}", f"wgmma.wait_group.sync.aligned {n};") for n in range(2)}  # until n groups at most are unfinished
# Depth of a product, and the dtype as PTX has it; of 8 bits both operands are K-major.
_WGMMA_DTYPE = {dtype: (16, kind) for dtype, kind in KIND.items()} | {"float8_e4m3fn": (32, "e4m3"), "int8": (32, "s8")}
stmatrix_x4 = ptx("stmatrix_x4", "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "", "rrrrr")
stmatrix_x4_trans = ptx("stmatrix_x4_trans", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", "", "rrrrr")
# Two float32 to a pair of float16, negative ones to 0; the higher of two pairs of u16.
f16_pair_relu = ptx("f16_pair_relu", "cvt.rn.relu.f16x2.f32 $0, $2, $1;", "r", "ff", pure=True)
max_u16_pair = ptx("max_u16_pair", "max.u16x2 $0, $1, $2;", "r", "rr", pure=True)


def wgmma_shared(dtype: str, n: int) -> Callable:
    """f(acc, 0, a, b, add): acc[64 x n] = A B^T (+ acc where add is not 0), of one warpgroup. a, b: descriptors of A[64 x 16] and B[n x 16]
    in shared memory, both K-major; of 8 bits 32 in place of 16. acc: a thread's n / 2 float32, of int8 int32, as in the PTX ISA, section
    "wgmma.mma_async.m64nNk16"."""
    registers = ", ".join(f"${i}" for i in range(n // 2))
    depth, kind = _WGMMA_DTYPE[dtype]
    if dtype == "int8":
        return ptx_accumulate(f"wgmma_shared_s8_{n}", f"{{ .reg .pred p; setp.ne.b32 p, ${n + 2}, 0; wgmma.mma_async.sync.aligned.m64n{n}"
                              f"k32.s32.s8.s8 {{{registers}}}, ${n}, ${n + 1}, p; }}", n // 2, "llr", of="r")
    return ptx_accumulate(f"wgmma_shared_{kind}_{n}", f"{{ .reg .pred p; setp.ne.b32 p, ${n + 2}, 0; "
                          f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {{{registers}}}, ${n}, ${n + 1}, p, 1, 1"
                          f"{', 0, 0' if depth == 16 else ''}; }}", n // 2, "llr")


def wgmma_registers(dtype: str, n: int, k_major: bool) -> Callable:
    """f(acc, 0, a0, a1, a2, a3, b, add): acc[64 x n] = A B (+ acc where add is not 0). A[64 x 16] in registers as mma.m16n8k16 has it, a
    warp's 16 rows; b: descriptor of B[16 x n] in shared memory, K-major as in wgmma_shared, or else N-major (n contiguous)."""
    registers = ", ".join(f"${i}" for i in range(n // 2))
    (depth, kind), transposed = _WGMMA_DTYPE[dtype], 0 if k_major else 1
    return ptx_accumulate(f"wgmma_registers_{kind}_{n}_{transposed}", f"{{ .reg .pred p; setp.ne.b32 p, ${n + 5}, 0; "
                          f"wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind} {{{registers}}}, "
                          f"{{${n}, ${n + 1}, ${n + 2}, ${n + 3}}}, ${n + 4}, p, 1, 1{f', {transposed}' if depth == 16 else ''}; }}",
                          n // 2, "rrrrlr")


class _ByValue(ArgumentAttributes):
    """byval in the dialect of NVVM, LLVM 7, which names no type. A tensor map is read from 64-byte boundaries."""

    def _to_list(self, typ: ir.Type) -> list[str]:
        return ["byval", "align 64"]


@intrinsic
def tensor_map(typingctx, parameter):
    """Address of a 128-byte tensor map that is a parameter of the kernel (letter t of a signature), a __grid_constant__. In the kernel
    itself alone: the function that calls this gets all its parameters of that type passed by value."""
    def codegen(context, builder, sig, args):
        function, module = builder.function, builder.module
        # Argument 0 is Numba's return value, which a kernel loses: what is left counts from 1, as NVVM does.
        maps = [i for i, a in enumerate(function.args) if a.type == args[0].type and not isinstance(a.attributes, _ByValue)]
        for i in maps:
            function.args[i].attributes = _ByValue()
        if maps:
            indices = module.add_metadata([ir.Constant(ir.IntType(32), i) for i in maps])
            module.add_named_metadata("nvvm.annotations").add(module.add_metadata([function, "grid_constant", indices]))
        return builder.ptrtoint(args[0], ir.IntType(64))
    return signature(types.uint64, parameter), codegen
