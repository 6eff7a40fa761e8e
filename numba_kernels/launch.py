"""A compiled kernel on torch's current stream, on the tensor's own device, through the driver.

Numba's dispatcher costs 75 us a launch; here the host part is packing the arguments into a kept block of memory and one driver call.
"""
from __future__ import annotations

import ctypes
import functools
import struct
import threading

import torch

from ftops.numba_kernels.compile import Spec, cubin
from ftops.numba_kernels.front_end import OLDEST

_FORMATS = {"p": "Q", "i": "i", "u": "I", "l": "q", "f": "f", "t": "128s"}
_LOCK = threading.Lock()


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """The device's compute capability. Raises RuntimeError below OLDEST, for which no kernel can be compiled."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST:
        raise RuntimeError(f"cuda:{device}, {torch.cuda.get_device_name(device)}, has compute capability {major}.{minor}; ftops kernels "
                           f"need {OLDEST[0]}.{OLDEST[1]} or above: use another GPU, or the CPU")
    return major, minor


@functools.cache
def architecture(device: int) -> str:
    """ "sm_90a" for Hopper, whose own instructions need the a; otherwise "sm_<major><minor>"."""
    major, minor = capability(device)
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def empty_like(t: torch.Tensor) -> torch.Tensor:
    """Uninitialised, contiguous, of t's shape, dtype and device. torch.empty with all three named costs the host 4 us more."""
    return torch.empty_like(t) if t.is_contiguous() else t.new_empty(t.shape)


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """A loaded kernel of one device. `kernel(grid_x, grid_y, grid_z, *arguments)` launches it; pointers are `tensor.data_ptr()`."""

    def __init__(self, spec: Spec, device: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{spec.name} is not loaded on cuda:{device} and cannot be while a CUDA graph is captured; "
                               "call ftops.warmup(model) or run the same call once before capture")
        from cuda.bindings import driver
        self.spec, self.device, self._driver = spec, device, driver
        self.cubin = cubin(spec, architecture(device))
        self._format = struct.Struct("@" + "".join(_FORMATS[c] for c in spec.signature))
        self._free: list[tuple] = []
        # Looked up once: an attribute of a module costs a launch 0.05 us each, torch.cuda.current_device() 0.3 more than the call below it.
        self._pack, self._launch, self._launch_ex = self._format.pack_into, driver.cuLaunchKernel, driver.cuLaunchKernelEx
        self._current_device, self._current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        self._threads, self._shared_bytes = spec.threads, spec.shared_bytes
        self._dependent = spec.dependent and capability(device) >= (9, 0)
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes the device's context current in this thread
            self._library = _checked(spec, driver.cuLibraryLoadData(self.cubin.code, [], [], 0, [], [], 0))
            self._function = driver.CUfunction(int(_checked(spec, driver.cuLibraryGetKernel(self._library, self.cubin.entry.encode()))))
            if spec.shared_bytes > 48 * 1024:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                kernel = driver.CUkernel(int(self._function))
                _checked(spec, driver.cuKernelSetAttribute(attribute, spec.shared_bytes, kernel, driver.CUdevice(device)))

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *arguments: int | float) -> None:
        device = self.device
        if self._current_device() != device:
            with torch.cuda.device(device):
                self(grid_x, grid_y, grid_z, *arguments)
            return
        # The driver copies the arguments before it returns, so a block of memory serves one launch at a time: threads take one each.
        try:
            block = self._free.pop()
        except IndexError:
            block = self._argument_block()
        memory, pointers, config = block
        self._pack(memory, 0, *arguments)
        if config is None:
            stream = self._current_stream(device)
            status = self._launch(self._function, grid_x, grid_y, grid_z, self._threads, 1, 1, self._shared_bytes, stream, pointers, 0)[0]
        else:
            config.gridDimX, config.gridDimY, config.gridDimZ, config.hStream = grid_x, grid_y, grid_z, self._current_stream(device)
            status = self._launch_ex(config, self._function, pointers, 0)[0]
        self._free.append(block)
        if status != 0:
            raise RuntimeError(f"{self.spec.name}: launch with grid ({grid_x}, {grid_y}, {grid_z}) on cuda:{device} failed: {status!r}")

    def _argument_block(self) -> tuple:
        """(argument bytes, address of the array of pointers to them, launch config or None). The pointers live as long as the block."""
        size = self._format.size
        count = len(self.spec.signature)
        raw = ctypes.create_string_buffer(size + 8 + 8 * count)
        first = ctypes.addressof(raw)
        table = first + (size + 7) // 8 * 8
        offset = 0
        for i, letter in enumerate(self.spec.signature):
            width = struct.calcsize(_FORMATS[letter])
            offset = (offset + width - 1) // width * width
            struct.pack_into("@Q", raw, table - first + 8 * i, first + offset)
            offset += width
        return raw, table, self._launch_config()

    def _launch_config(self) -> object | None:
        spec, driver = self.spec, self._driver
        if spec.cluster == 1 and not self._dependent:
            return None
        attributes = []
        if spec.cluster > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = spec.cluster, 1, 1
            attributes.append(cluster)
        if self._dependent:
            dependent = driver.CUlaunchAttribute()
            dependent.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            dependent.value.programmaticStreamSerializationAllowed = 1
            attributes.append(dependent)
        config = driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = spec.threads, 1, 1
        config.sharedMemBytes, config.attrs, config.numAttrs = spec.shared_bytes, attributes, len(attributes)
        return config


_LOADED: dict[tuple[Spec, int], Kernel] = {}


def load(spec: Spec, device: int) -> Kernel:
    """The kernel of `spec` on CUDA device `device`, compiled and loaded once a process. Raises RuntimeError during graph capture."""
    with _LOCK:
        kernel = _LOADED.get((spec, device))
        if kernel is None:
            kernel = _LOADED[spec, device] = Kernel(spec, device)
    return kernel


def _checked(spec: Spec, result: tuple) -> object:
    status, *values = result
    if status != 0:
        raise RuntimeError(f"{spec.name}: {status!r}")
    return values[0] if values else None
