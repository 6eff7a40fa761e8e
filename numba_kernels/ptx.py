"""Every PTX instruction used, as a Numba intrinsic. PTX ISA 8.x names; operands by letter: r = u32, l = u64, f = f32.

16-bit values travel as the two halves of a u32: Numba's own float16 and bfloat16 link C++ and double the compile time.
Numba is imported here and in the kernel files only, so this module is loaded at the first use of a kernel.
"""
from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable

import numpy as np

if not hasattr(np, "row_stack"):  # numba-cuda 0.30 names what NumPy 2.5 removed
    np.row_stack = np.vstack

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.typing import signature

_OPERAND = {"r": (ir.IntType(32), types.uint32), "l": (ir.IntType(64), types.uint64), "f": (ir.FloatType(), types.float32)}


HALVES = ("float16", "bfloat16")
_STAND_INS: dict[float, dict[str, float]] = {}


def _marked(texts: dict[int, str] | dict[str, str]) -> str:
    """Texts by the first compute capability that has each, or by dtype, as one: Numba and LLVM, which do not read them, work once for all,
    and `for_target` chooses."""
    first, *others = (f"{case}:{text}" for case, text in texts.items())
    return "``" + "`".join((first, *(other.replace(";", "~") for other in others))) + "``"


def for_target(code: str, capability: int, dtype: str | None) -> str:
    """LLVM IR or PTX with the texts of a compute capability such as 90, and of the dtype, one of HALVES, that "16-bit" stands for."""
    def chosen(mark: re.Match) -> str:
        texts = {case: text for case, _, text in (part.partition(":") for part in mark[1].replace("~", ";").split("`"))}
        return texts[dtype] if dtype in texts else texts[str(max(int(since) for since in texts if int(since) <= capability))]

    if dtype:
        for stand_in, values in _STAND_INS.items():
            for before, after in zip(_as_text(stand_in), _as_text(values[dtype]), strict=True):
                code = code.replace(before, after)
    return re.sub("``(.+?)``", chosen, code)


def half_constant(values: dict[str, float]) -> np.float32:
    """A number that stands for the value of each of HALVES until `for_target`. To compare with: what LLVM computes of it would stay."""
    stand_in = np.uint32(0x4E5EED00 + len(_STAND_INS)).view(np.float32)
    _STAND_INS[float(stand_in)] = values
    return stand_in


def _as_text(value: float) -> tuple[str, str]:
    """A float32 as LLVM IR and PTX have it."""
    return "0x" + struct.pack(">d", value).hex(), "0f" + struct.pack(">f", value).hex().upper()


def with_half(texts: dict[str, str]) -> dict[str, str]:
    """A text for each of HALVES, and for "16-bit", which stands for one of them until `for_target`."""
    return texts | {"16-bit": _marked(texts)}


def _as_intrinsic(name: str, params: list[str], codegen: Callable, result: types.Type) -> Callable:
    """`intrinsic` wants a function with a fixed parameter list, so its typing function is written out."""
    name, arguments = re.sub(r"\W", "_", name), ", ".join(params)
    source = f"def {name}({', '.join(['typingctx', *params])}):\n    return typed({arguments}), codegen\n"
    scope = {"typed": lambda *args: signature(result, *args), "codegen": codegen}
    exec(source, scope)
    return intrinsic(scope[name])


def ptx(name: str, asm: str | dict[int, str], outs: str = "", ins: str = "", pure: bool = False) -> Callable:
    """Intrinsic `name(*ins)` for one PTX text; returns nothing, a scalar, or a tuple. `pure` lets LLVM move, merge or drop it.

    asm may give a text by the first compute capability that has it: {80: ..., 89: ...}.
    """
    result_ir = ir.VoidType() if not outs else _OPERAND[outs][0] if len(outs) == 1 else ir.LiteralStructType([_OPERAND[c][0] for c in outs])
    result = types.void if not outs else _OPERAND[outs][1] if len(outs) == 1 else types.UniTuple(_OPERAND[outs[0]][1], len(outs))
    constraints = ",".join(["=" + c for c in outs] + list(ins) + ([] if pure else ["~{memory}"]))
    text = asm if isinstance(asm, str) else _marked(asm)

    def codegen(context, builder, sig, args):
        values = [context.cast(builder, a, t, _OPERAND[c][1]) for a, t, c in zip(args, sig.args, ins, strict=True)]
        function = ir.InlineAsm(ir.FunctionType(result_ir, [_OPERAND[c][0] for c in ins]), text, constraints, side_effect=not pure)
        call = builder.call(function, values)
        if not outs:
            return context.get_dummy_value()
        if len(outs) == 1:
            return call
        packed = ir.Constant(ir.ArrayType(_OPERAND[outs[0]][0], len(outs)), ir.Undefined)
        for i in range(len(outs)):
            packed = builder.insert_value(packed, builder.extract_value(call, i), i)
        return packed

    return _as_intrinsic(name, [f"a{i}" for i in range(len(ins))], codegen, result)


def ptx_accumulate(name: str, asm: str, count: int, ins: str, of: str = "f") -> Callable:
    """Intrinsic `name(acc, start, *ins)`: `asm` updates acc[start : start + count] in place; of: their letter, r for int32.

    acc is a cuda.local.array; LLVM keeps it in registers as long as `start` and every other index is a constant after unrolling.
    In `asm`, $0 .. $(count - 1) are the accumulators and the inputs start at $(2 count).
    """
    held, i64 = _OPERAND[of][0], ir.IntType(64)
    constraints = ",".join(["=" + of] * count + [str(i) for i in range(count)] + list(ins) + ["~{memory}"])

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        start = context.cast(builder, args[1], sig.args[1], types.int64)
        pointers = [builder.gep(data, [builder.add(start, ir.Constant(i64, i))]) for i in range(count)]
        values = [context.cast(builder, a, t, _OPERAND[c][1]) for a, t, c in zip(args[2:], sig.args[2:], ins, strict=True)]
        function = ir.InlineAsm(ir.FunctionType(ir.LiteralStructType([held] * count), [held] * count + [_OPERAND[c][0] for c in ins]),
                                asm, constraints, side_effect=True)
        out = builder.call(function, [builder.load(p) for p in pointers] + values)
        for i, pointer in enumerate(pointers):
            builder.store(builder.extract_value(out, i), pointer)
        return context.get_dummy_value()

    return _as_intrinsic(name, ["acc", "start"] + [f"a{i}" for i in range(len(ins))], codegen, types.void)


@functools.cache
def scale_fragments(count: int) -> Callable:
    """Intrinsic `scale(acc, start, low, high)`: `count` accumulator fragments from acc[start] on, rows g times low, rows g + 8 times high.

    Written out in LLVM IR: in a kernel of this size LLVM for sm_100 keeps such a loop as one, and with it acc in local memory.
    """
    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        start = context.cast(builder, args[1], sig.args[1], types.int64)
        factors = [context.cast(builder, a, t, types.float32) for a, t in zip(args[2:], sig.args[2:], strict=True)]
        for i in range(4 * count):
            pointer = builder.gep(data, [builder.add(start, ir.Constant(ir.IntType(64), i))])
            builder.store(builder.fmul(builder.load(pointer), factors[i % 4 // 2]), pointer)
        return context.get_dummy_value()

    return _as_intrinsic(f"scale_fragments_{count}", ["acc", "start", "low", "high"], codegen, types.void)


@intrinsic
def shared_address(typingctx, array):
    """32-bit shared-memory address of a cuda.shared.array."""
    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        function = ir.InlineAsm(ir.FunctionType(ir.IntType(64), [ir.IntType(64)]), "cvta.to.shared.u64 $0, $1;", "=l,l")
        return builder.trunc(builder.call(function, [builder.ptrtoint(data, ir.IntType(64))]), ir.IntType(32))
    return signature(types.uint32, array), codegen


KIND = with_half({"float16": "f16", "bfloat16": "bf16"})  # as PTX has it

# Global memory. `nc` goes through the read-only path: only for data that no thread of the launch writes.
ld_global_16 = ptx("ld_global_16", "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.u32.u16 $0, t; }", "r", "l")
ld_global_8 = ptx("ld_global_8", "{ .reg .b16 t; ld.global.nc.u8 t, [$1]; cvt.u32.u16 $0, t; }", "r", "l")
ld_global_32 = ptx("ld_global_32", "ld.global.nc.b32 $0, [$1];", "r", "l")
ld_global_f32 = ptx("ld_global_f32", "ld.global.nc.f32 $0, [$1];", "f", "l")
ld_global_u64 = ptx("ld_global_u64", "ld.global.nc.b64 $0, [$1];", "l", "l")
ld_global_128 = ptx("ld_global_128", "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "rrrr", "l")
st_global_16 = ptx("st_global_16", "{ .reg .b16 t; cvt.u16.u32 t, $1; st.global.b16 [$0], t; }", "", "lr")
st_global_8 = ptx("st_global_8", "{ .reg .b16 t; cvt.u16.u32 t, $1; st.global.u8 [$0], t; }", "", "lr")
st_global_32 = ptx("st_global_32", "st.global.b32 [$0], $1;", "", "lr")
st_global_f32 = ptx("st_global_f32", "st.global.f32 [$0], $1;", "", "lf")
st_global_64 = ptx("st_global_64", "st.global.v2.b32 [$0], {$1, $2};", "", "lrr")
st_global_128 = ptx("st_global_128", "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "", "lrrrr")
# Loads and stores where the last operand is not 0; elsewhere a load gives 0. Without branches, several are on their way at once.
ld_global_32_if = ptx("ld_global_32_if", "{ .reg .pred p; .reg .b32 t; setp.ne.u32 p, $2, 0; mov.b32 t, 0; @p ld.global.nc.b32 t, [$1]; "
                      "mov.b32 $0, t; }", "r", "lr")
st_global_16_if = ptx("st_global_16_if", "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, $2, 0; cvt.u16.u32 t, $1; "
                      "@p st.global.b16 [$0], t; }", "", "lrr")
st_global_32_if = ptx("st_global_32_if", "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.b32 [$0], $1; }", "", "lrr")
st_global_64_if = ptx("st_global_64_if", "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.v2.b32 [$0], {$1, $2}; }", "", "lrrr")
st_global_128_if = ptx("st_global_128_if", "{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4}; }",
                       "", "lrrrrr")
prefetch_l2 = ptx("prefetch_l2", "prefetch.global.L2 [$0];", "", "l")
# $1 bytes from $0 on, both multiples of 16, into L2; nothing before sm_90.
prefetch_l2_bulk = ptx("prefetch_l2_bulk", {80: "", 90: "cp.async.bulk.prefetch.L2.global [$0], $1;"}, "", "lr")
# What a kernel before this one in the stream has written, which need not have ended.
ld_written_128 = ptx("ld_written_128", "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "rrrr", "l")
ld_written_32 = ptx("ld_written_32", "ld.global.b32 $0, [$1];", "r", "l")
# Past L1, where what is read before that kernel has ended would be found again after it.
ld_early_32 = ptx("ld_early_32", "ld.relaxed.gpu.global.b32 $0, [$1];", "r", "l")
ld_written_16 = ptx("ld_written_16", "{ .reg .b16 t; ld.global.b16 t, [$1]; cvt.u32.u16 $0, t; }", "r", "l")
ld_written_f32 = ptx("ld_written_f32", "ld.global.f32 $0, [$1];", "f", "l")
ld_written_f32_if = ptx("ld_written_f32_if", "{ .reg .pred p; .reg .f32 t; setp.ne.u32 p, $2, 0; mov.f32 t, $3; @p ld.global.f32 t, [$1]; "
                        "mov.f32 $0, t; }", "f", "lrf")  # elsewhere the last operand
ld_written_16_if = ptx("ld_written_16_if", "{ .reg .pred p; .reg .b16 t; setp.ne.u32 p, $2, 0; mov.b16 t, 0; @p ld.global.b16 t, [$1]; "
                       "cvt.u32.u16 $0, t; }", "r", "lr")
ld_written_32_if = ptx("ld_written_32_if", "{ .reg .pred p; .reg .b32 t; setp.ne.u32 p, $2, 0; mov.b32 t, 0; @p ld.global.b32 t, [$1]; "
                       "mov.b32 $0, t; }", "r", "lr")
ld_written_128_if = ptx("ld_written_128_if", "{ .reg .pred p; .reg .b32 t<4>; setp.ne.u32 p, $5, 0; mov.b32 t0, 0; mov.b32 t1, 0; "
                        "mov.b32 t2, 0; mov.b32 t3, 0; @p ld.global.v4.b32 {t0, t1, t2, t3}, [$4]; mov.b32 $0, t0; mov.b32 $1, t1; "
                        "mov.b32 $2, t2; mov.b32 $3, t3; }", "rrrr", "lr")

# The value before; wraps to 0 past $2. What the block has written before its last barrier is there for whoever reads the count after it.
atomic_inc_u32 = ptx("atomic_inc_u32", "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;", "r", "lr")

# Shared memory.
ld_shared_32 = ptx("ld_shared_32", "ld.shared.b32 $0, [$1];", "r", "r")
ld_shared_f32 = ptx("ld_shared_f32", "ld.shared.f32 $0, [$1];", "f", "r")
ld_shared_64 = ptx("ld_shared_64", "ld.shared.v2.b32 {$0, $1}, [$2];", "rr", "r")
ld_shared_128 = ptx("ld_shared_128", "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "rrrr", "r")
st_shared_32 = ptx("st_shared_32", "st.shared.b32 [$0], $1;", "", "rr")
st_shared_f32 = ptx("st_shared_f32", "st.shared.f32 [$0], $1;", "", "rf")
st_shared_64 = ptx("st_shared_64", "st.shared.v2.b32 [$0], {$1, $2};", "", "rrr")
st_shared_128 = ptx("st_shared_128", "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "", "rrrrr")

# Asynchronous copies, sm_80 and up. $2 is how many of the 16 bytes to read; the rest is written as zeros.
cp_async_16 = ptx("cp_async_16", "cp.async.cg.shared.global [$0], [$1], 16, $2;", "", "rlr")
cp_async_16_l1 = ptx("cp_async_16_l1", "cp.async.ca.shared.global [$0], [$1], 16, $2;", "", "rlr")  # and kept in L1
cp_async_4 = ptx("cp_async_4", "cp.async.ca.shared.global [$0], [$1], 4;", "", "rl")
cp_async_8 = ptx("cp_async_8", "cp.async.ca.shared.global [$0], [$1], 8, $2;", "", "rlr")
cp_async_commit = ptx("cp_async_commit", "cp.async.commit_group;")
cp_async_wait_0 = ptx("cp_async_wait_0", "cp.async.wait_group 0;")
CP_ASYNC_WAIT = {n: ptx(f"cp_async_wait_{n}", f"cp.async.wait_group {n};") for n in range(16)}  # until n groups at most are on their way

# Tensor cores, sm_80 and up: acc[16 x 8] += A[16 x 16] B[16 x 8], fragments as in the PTX ISA, section "mma.m16n8k16".
ldmatrix_x4 = ptx("ldmatrix_x4", "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r")
ldmatrix_x4_trans = ptx("ldmatrix_x4_trans", "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "rrrr", "r")
movmatrix_trans = ptx("movmatrix_trans", "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "r", "r")  # 8x8, held as ldmatrix holds it
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.%s.%s.f32 {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$0, $1, $2, $3};"
MMA = {dtype: ptx_accumulate(f"mma_{dtype}", _MMA % (kind, kind), 4, "rrrrrr") for dtype, kind in KIND.items()}
# acc[16 x 8] += A[16 x 8] B[8 x 8].
_MMA_K8 = "mma.sync.aligned.m16n8k8.row.col.f32.%s.%s.f32 {$0, $1, $2, $3}, {$8, $9}, {$10}, {$0, $1, $2, $3};"
MMA_K8 = {dtype: ptx_accumulate(f"mma_k8_{dtype}", _MMA_K8 % (kind, kind), 4, "rrr") for dtype, kind in KIND.items()}

# Programmatic dependent launch (Spec.dependent), sm_90 and up: the next kernel may start now; what the kernel before has written is there.
launch_dependents = ptx("launch_dependents", {80: "", 90: "griddepcontrol.launch_dependents;"})
wait_for_primary = ptx("wait_for_primary", {80: "", 90: "griddepcontrol.wait;"})

# x, computed here: what is derived from it is not hoisted out of a branch that is seldom taken, where it would hold registers.
here = ptx("here", "mov.b32 $0, $1;", "r", "r")

# Conversions. A pair is a u32 whose low half comes first in memory.
bits_f32 = ptx("bits_f32", "mov.b32 $0, $1;", "f", "r", pure=True)
f32_bits = ptx("f32_bits", "mov.b32 $0, $1;", "r", "f", pure=True)
LOW = {dtype: ptx(f"low_{dtype}", text, "f", "r", pure=True) for dtype, text in with_half({
    "float16": "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }",
    "bfloat16": "{ .reg .b32 t; shl.b32 t, $1, 16; mov.b32 $0, t; }"}).items()}
HIGH = {dtype: ptx(f"high_{dtype}", text, "f", "r", pure=True) for dtype, text in with_half({
    "float16": "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h; }",
    "bfloat16": "{ .reg .b32 t; and.b32 t, $1, 0xffff0000; mov.b32 $0, t; }"}).items()}
PAIR = {dtype: ptx(f"pair_{dtype}", f"cvt.rn.{kind}x2.f32 $0, $2, $1;", "r", "ff", pure=True) for dtype, kind in KIND.items()}
ONES = {dtype: ptx(f"ones_{dtype}", f"mov.b32 $0, {word};", "r", pure=True) for dtype, word in with_half({
    "float16": "0x3C003C00", "bfloat16": "0x3F803F80"}).items()}
f16_low, f16_pair = LOW["float16"], PAIR["float16"]
bf16_low, bf16_high, bf16_pair = LOW["bfloat16"], HIGH["bfloat16"], PAIR["bfloat16"]
# Two 8-bit values to two float16. The low 16 bits of $1 are read; before sm_89 the exponent is moved and rebased (a NaN reads as 480).
e4m3_to_f16_pair = ptx("e4m3_to_f16_pair", {
    80: "{ .reg .b32 a, s; prmt.b32 a, $1, 0, 0x1404; and.b32 s, a, 0x80008000; and.b32 a, a, 0x7f007f00; shr.u32 a, a, 1; or.b32 a, a, s; "
        "mov.b32 s, 0x5c005c00; mul.rn.f16x2 $0, a, s; }",
    89: "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }"}, "r", "r", pure=True)
# Two float32 to two bytes, e4m3, clipped to +-448. Only where has_e4m3() is not 0: elsewhere the linker drops what the test guards.
has_e4m3 = ptx("has_e4m3", {80: "mov.u32 $0, 0;", 89: "mov.u32 $0, 1;"}, "r", pure=True)
e4m3_pair = ptx("e4m3_pair", {80: "mov.b32 $0, $1;", 89: "{ .reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; cvt.u32.u16 $0, t; }"},
                "r", "ff", pure=True)
permute = ptx("permute", "prmt.b32 $0, $1, $2, $3;", "r", "rrr", pure=True)  # byte i of the result is byte $3[4 i + 3 : 4 i] of ($2, $1)
sub_f16_pair = ptx("sub_f16_pair", "sub.rn.f16x2 $0, $1, $2;", "r", "rr", pure=True)
and_or = ptx("and_or", "lop3.b32 $0, $1, $2, $3, 0xEA;", "r", "rrr", pure=True)  # ($1 & $2) | $3
# a * b + c of two 16-bit values, rounded once.
FMA_PAIR = {dtype: ptx(f"fma_pair_{dtype}", f"fma.rn.{kind}x2 $0, $1, $2, $3;", "r", "rrr", pure=True) for dtype, kind in KIND.items()}

# float32 arithmetic. Python literals are float64 in Numba: constants are written np.float32(...), and division is `reciprocal`.
fma = ptx("fma", "fma.rn.f32 $0, $1, $2, $3;", "f", "fff", pure=True)
maximum = ptx("maximum", "max.f32 $0, $1, $2;", "f", "ff", pure=True)
maximum_nan = ptx("maximum_nan", "max.NaN.f32 $0, $1, $2;", "f", "ff", pure=True)  # NaN if one of both is
minimum = ptx("minimum", "min.f32 $0, $1, $2;", "f", "ff", pure=True)
exp2 = ptx("exp2", "ex2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
log2 = ptx("log2", "lg2.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
reciprocal = ptx("reciprocal", "rcp.approx.ftz.f32 $0, $1;", "f", "f", pure=True)
divide_rn = ptx("divide_rn", "div.rn.f32 $0, $1, $2;", "f", "ff", pure=True)
round_i32 = ptx("round_i32", "cvt.rni.s32.f32 $0, $1;", "r", "f", pure=True)
divide = ptx("divide", "div.full.f32 $0, $1, $2;", "f", "ff", pure=True)
rsqrt = ptx("rsqrt", "rsqrt.approx.f32 $0, $1;", "f", "f", pure=True)

# Numba divides in 64 bits.
div_u32 = ptx("div_u32", "div.u32 $0, $1, $2;", "r", "rr", pure=True)

# Warp shuffles and votes.
warp_sync = ptx("warp_sync", "bar.warp.sync 0xffffffff;")
# x of lane 0, which the assembler then knows to be one for the whole warp: what is derived from it goes through uniform registers.
uniform = ptx("uniform", "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "r", "r")
shuffle_index = ptx("shuffle_index", "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "r", "rr")
ballot = ptx("ballot", "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }", "r", "r")
shuffle_xor = {n: ptx(f"shuffle_xor_{n}", f"shfl.sync.bfly.b32 $0, $1, {n}, 0x1f, 0xffffffff;", "f", "f") for n in (1, 2, 4, 8, 16)}
