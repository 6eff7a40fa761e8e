"""A kernel that is slow or does not exist on some GPU: every variant of every kernel, for every architecture, without a GPU."""
from __future__ import annotations

import inspect
import struct
import warnings
from collections import defaultdict

import pytest
import torch

from ftops.numba_kernels import KERNELS, variants, variants_of
from ftops.numba_kernels.compile import ARCHITECTURES, Spec, compile_spec
from ftops.numba_kernels.launch import capability
from ftops.numba_kernels.machine_code import Cubin, find_ptxas
from ftops.numba_kernels.prebuild import build_all, complaints
from tests.kernels import tiny


@pytest.mark.slow
def test_every_variant_on_every_architecture():
    """None spills beyond what its Spec announces, none has its wgmma serialised or its setmaxnreg ignored. Takes the disk cache."""
    wrong, built = [], defaultdict(int)
    for arch, variant, made, complaint in build_all(ARCHITECTURES):
        built[arch] += 1
        assert made.arch == arch
        if complaint:
            wrong.append(f"{arch} {variant}: {complaint}")
        if made.stack_bytes:
            warnings.warn(f"{arch} {variant} has a stack frame of {made.stack_bytes} bytes", stacklevel=1)
    assert wrong == []
    assert built == {arch: sum(spec.serves(arch) for spec in variants()) for arch in ARCHITECTURES}


@pytest.mark.parametrize("name", KERNELS)
def test_variants_are_distinct_and_take_what_they_declare(name):
    specs = list(variants_of(name))
    assert len(set(specs)) == len(specs) > 0
    for spec in {spec.make: spec for spec in specs}.values():
        assert len(inspect.signature(spec.make(spec.source.config)).parameters) == len(spec.signature)
    for spec in specs:
        assert spec.threads % 32 == 0 and 32 <= spec.threads <= 1024
        assert 0 <= spec.shared_bytes <= 227 * 1024
        assert spec.min_blocks >= 1 and 1 <= spec.cluster <= 16
        assert spec.only in (None, *ARCHITECTURES)
        assert str(spec.config) in spec.name and name.partition("_")[0] in spec.name


def machine_code(made: Cubin) -> bytes:
    """The section .text of an ELF file, which does not hold the name of the kernel."""
    table, = struct.unpack_from("<Q", made.code, 40)
    size, count, names_index = struct.unpack_from("<HHH", made.code, 58)
    sections = [struct.unpack_from("<IIQQQQ", made.code, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    return next(made.code[offset : offset + length] for name, _, _, _, offset, length in sections
                if made.code[names + name :].startswith(b".text."))


def halves_of(name: str) -> list[Spec]:
    """The variants, float16 and bfloat16, of the kernel's first source that makes both."""
    first = next(spec for spec in variants_of(name) if spec.halves and spec.config.dtype == "float16")
    return [spec for spec in variants_of(name) if spec.source == first.source]


@pytest.mark.parametrize("name", ["rms_norm", "gated_activation", "quantise_rows", "attention"])
def test_code_made_with_that_of_others_is_the_code_made_alone(name):
    """What the compile test and prebuild look at is what a user's GPU gets, who compiles one variant for one architecture."""
    ptxas = find_ptxas()
    if ptxas is None:
        pytest.skip('no ptxas of the version of nvJitLink: pip install "cuda-toolkit[nvcc]"')
    codes, specs = set(), dict.fromkeys((next(variants_of(name)), *halves_of(name)))
    for spec in specs:
        arches = [arch for arch in ARCHITECTURES if spec.serves(arch)]
        together = list(compile_spec(spec, arches, ptxas))
        assert [made.arch for made in together] == arches
        for made in together:
            alone, = compile_spec(spec, (made.arch,))
            assert machine_code(made) == machine_code(alone)
            assert (made.registers, made.spill_bytes, made.stack_bytes) == (alone.registers, alone.spill_bytes, alone.stack_bytes)
            codes.add(machine_code(made))
    assert len(codes) == len(specs) * len(arches)


def test_instructions_that_depend_on_the_architecture():
    """Made for each: an instruction of sm_90 in code for sm_80 does not load, the other way round a GPU is not used."""
    for made in compile_spec(tiny.TARGETED, ARCHITECTURES):
        ours, other = (80, 90) if made.arch == "sm_80" else (90, 80)
        assert struct.pack("<I", tiny.TARGET[ours]) in machine_code(made)
        assert struct.pack("<I", tiny.TARGET[other]) not in machine_code(made)


def test_spills_are_seen():
    made, = compile_spec(tiny.SPILLING, ("sm_90a",))
    assert made.registers == 64
    assert made.spill_bytes >= 4 * (tiny.LIVE - 64)
    assert f"spills {made.spill_bytes} bytes, 0 are announced" in complaints(tiny.SPILLING, made)


def test_stack_frames_are_seen():
    made, = compile_spec(tiny.INDEXED, ("sm_90a",))
    assert made.stack_bytes >= 4 * tiny.LIVE
    assert made.spill_bytes == 0


@pytest.mark.parametrize("code", ["C7504", "C7509"])
def test_warnings_of_the_linker_are_complaints(code):
    made = Cubin(b"", "", "sm_90a", 168, 0, 0, (f"ptxas info : ({code}) Potential Performance Loss: 'setmaxnreg' ignored",))
    assert code in complaints(tiny.fill(), made)


def test_resources_are_those_of_the_kernel():
    made, = compile_spec(tiny.fill(), ("sm_80",))
    assert 1 <= made.registers <= 16
    assert (made.spill_bytes, made.stack_bytes, made.warnings) == (0, 0, ())
    assert made.entry.encode() in made.code and "fill" in made.entry
    assert complaints(tiny.fill(), made) == ""


def test_a_gpu_that_no_kernel_serves_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"cuda:1, Tesla T4, has compute capability 7\.5; ftops kernels need 8\.0 or above"):
        capability.__wrapped__(1)
