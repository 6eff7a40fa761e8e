"""Small kernels, each showing one thing that compiling or launching must get right."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import cuda

from ftops.numba_kernels import ptx
from ftops.numba_kernels.compile import Spec

THREADS = 128
LIVE = 144  # floats that a thread of `spilling` holds at once: more than the 64 registers that 1024 threads leave it
TARGET = {80: 0x13579B80, 90: 0x13579B90}
# Of clusters, sm_90 and up: cluster_address is the place in block $2 of what lies at $1 here; cluster_sync waits for every thread of the
# cluster, and what they wrote before it is then seen.
cluster_rank = ptx.ptx("cluster_rank", "mov.u32 $0, %cluster_ctarank;", "r")
cluster_size = ptx.ptx("cluster_size", "mov.u32 $0, %cluster_nctarank;", "r")
cluster_sync = ptx.ptx("cluster_sync", "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;")
cluster_address = ptx.ptx("cluster_address", "mapa.shared::cluster.u32 $0, $1, $2;", "r", "rr", pure=True)
ld_cluster_64 = ptx.ptx("ld_cluster_64", "ld.shared::cluster.v2.b32 {$0, $1}, [$2];", "rr", "r")
target_number = ptx.ptx("target_number", {since: f"mov.u32 $0, {number};" for since, number in TARGET.items()}, "r")


@dataclass(frozen=True)
class Config:
    """size: what a kernel takes for its constants; another size is another kernel."""

    size: int = 1


def make_fill(config: Config) -> Callable:
    """y[i] = value, i < count."""
    size = config.size

    def fill(y_gl, value, count):
        i = np.uint32(cuda.blockIdx.x) * np.uint32(THREADS) + np.uint32(cuda.threadIdx.x)
        if i < count:
            ptx.st_global_f32(y_gl + np.uint64(4) * np.uint64(i), value * np.float32(size))
    return fill


def make_echo(config: Config) -> Callable:
    """y[0:6], int64: the arguments as they arrived, the float times 1024."""
    @cuda.jit(device=True, forceinline=True)
    def put(address, value):
        ptx.st_global_64(address, np.uint32(value & np.int64(0xFFFFFFFF)), np.uint32(value >> np.int64(32)))

    def echo(flag, y_gl, small, ratio, wide, unsigned, other_gl):
        if cuda.threadIdx.x == 0:
            put(y_gl + np.uint64(0), np.int64(flag))
            put(y_gl + np.uint64(8), np.int64(small))
            put(y_gl + np.uint64(16), np.int64(ratio * np.float32(1024)))
            put(y_gl + np.uint64(24), np.int64(wide))
            put(y_gl + np.uint64(32), np.int64(unsigned))
            put(y_gl + np.uint64(40), np.int64(other_gl))
    return echo


def make_reverse(config: Config) -> Callable:
    """y[i] = x[size - 1 - i], through `size` floats of dynamic shared memory."""
    size = config.size

    def reverse(x_gl, y_gl):
        shared = cuda.shared.array(0, np.float32)
        for i in range(cuda.threadIdx.x, size, THREADS):
            shared[i] = ptx.ld_global_f32(x_gl + np.uint64(4 * i))
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, size, THREADS):
            ptx.st_global_f32(y_gl + np.uint64(4 * i), shared[size - 1 - i])
    return reverse


def make_neighbours(config: Config) -> Callable:
    """y[block] = 1000 * (size of the cluster) + the number that the next block of the cluster has put into its own shared memory."""
    def neighbours(y_gl):
        shared = cuda.shared.array(2, np.uint32)
        rank, size = cluster_rank(), cluster_size()
        if cuda.threadIdx.x == 0:
            shared[0] = np.uint32(cuda.blockIdx.x)
            shared[1] = size
        cluster_sync()
        following = rank + np.uint32(1) if rank + np.uint32(1) < size else np.uint32(0)
        number, its_size = ld_cluster_64(cluster_address(ptx.shared_address(shared), following))
        cluster_sync()  # no block may end while its shared memory is read
        if cuda.threadIdx.x == 0:
            ptx.st_global_32(y_gl + np.uint64(4) * np.uint64(cuda.blockIdx.x), np.uint32(1000) * its_size + number)
    return neighbours


def make_increase(config: Config) -> Callable:
    """y[i] = x[i] + 1, i < count, where x is what the kernel before wrote, which need not have ended when this one starts."""
    def increase(x_gl, y_gl, count):
        i = np.uint32(cuda.blockIdx.x) * np.uint32(THREADS) + np.uint32(cuda.threadIdx.x)
        ptx.launch_dependents()
        ptx.wait_for_primary()
        if i < count:
            at = np.uint64(4) * np.uint64(i)
            ptx.st_global_f32(y_gl + at, ptx.ld_written_f32(x_gl + at) + np.float32(1))
    return increase


def make_target(config: Config) -> Callable:
    """y[0] = a number whose instruction depends on the architecture."""
    def target(y_gl):
        ptx.st_global_32(y_gl, target_number())
    return target


def make_spilling(config: Config) -> Callable:
    """Holds more floats at once than its registers."""
    def spilling(x_gl, y_gl):
        values = cuda.local.array(LIVE, np.float32)
        for i in range(LIVE):
            values[i] = ptx.ld_written_f32(x_gl + np.uint64(4 * i))
        for i in range(LIVE):
            ptx.st_global_f32(y_gl + np.uint64(4 * i), values[LIVE - 1 - i])
    return spilling


def make_indexed(config: Config) -> Callable:
    """Indexes a local array by an argument, which puts it into memory."""
    def indexed(x_gl, y_gl, which):
        values = cuda.local.array(LIVE, np.float32)
        for i in range(LIVE):
            values[i] = ptx.ld_written_f32(x_gl + np.uint64(4 * i))
        values[which] += np.float32(1)
        for i in range(LIVE):
            ptx.st_global_f32(y_gl + np.uint64(4 * i), values[LIVE - 1 - i])
    return indexed


def fill(size: int = 1) -> Spec:
    return Spec(make_fill, Config(size), "pfu", THREADS)


ECHO = Spec(make_echo, Config(), "ipiflup", THREADS)
NEIGHBOURS = Spec(make_neighbours, Config(), "p", THREADS, cluster=4)
INCREASE = Spec(make_increase, Config(), "ppu", THREADS, dependent=True)
TARGETED = Spec(make_target, Config(), "p", THREADS)
SPILLING = Spec(make_spilling, Config(), "pp", 1024)
INDEXED = Spec(make_indexed, Config(), "ppi", THREADS)


def reverse(size: int) -> Spec:
    return Spec(make_reverse, Config(size), "pp", THREADS, shared_bytes=4 * size)
