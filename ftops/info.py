"""What `ftops info` shows: versions, GPUs or what is missing for them, the folder of compiled kernels, and what serves each op."""
from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from ftops import __version__
from ftops.ops import OPS, compiler_problem, kernel_cache, kernel_file, oldest_capability, op_module
from ftops.ops.candidates import known

# Several names: the wheels of CUDA 12 carry it as a suffix.
PACKAGES = (
    ("transformers",), ("accelerate",), ("numpy",), ("numba",), ("numba-cuda",), ("cuda-bindings",),
    ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"), ("nvidia-nvjitlink", "nvidia-nvjitlink-cu12"),
)


def installed(*names: str) -> str | None:
    """The version of the first of `names` that is installed. Imports nothing."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def missing_for_gpu() -> list[str]:
    """Why the Numba kernels cannot run here, a sentence each; empty where they can."""
    missing = []
    if torch.version.cuda is None:
        missing.append(f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build (https://pytorch.org/get-started/locally)")
    elif not torch.cuda.is_available():
        missing.append(f"PyTorch is built for CUDA {torch.version.cuda} but finds no device: `nvidia-smi` must list a GPU, and its driver "
                       f"must support CUDA {torch.version.cuda}")
    elif torch.cuda.get_device_capability() < oldest_capability():
        missing.append(f"{torch.cuda.get_device_name()} has compute capability {_dotted(torch.cuda.get_device_capability())}; "
                       f"the kernels need {_dotted(oldest_capability())}")
    problem = compiler_problem()
    if problem:
        missing.append(problem)
    return missing


def show(console: Console) -> None:
    console.print(f"ftops {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__} "
                  f"({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}), {platform.system()} {platform.machine()}")
    console.print(", ".join(f"{names[0]} {installed(*names) or 'not installed'}" for names in PACKAGES))

    missing = missing_for_gpu()
    if torch.cuda.is_available():
        table = Table("device", "name", "compute capability", "memory", "multiprocessors", title="GPUs", title_justify="left")
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            table.add_row(f"cuda:{index}", about.name, f"{about.major}.{about.minor}", f"{about.total_memory / 2**30:.0f} GiB",
                          str(about.multi_processor_count))
        console.print(table)
    else:
        console.print("GPUs: none found. The CPU is used: every op runs there, with the same results.")
    if missing:
        console.print("The kernels cannot run here:")
    for sentence in missing:
        console.print(f"* {sentence}", soft_wrap=True, markup=False)  # "[cu13]" is no style

    folder = kernel_cache()
    kernels = list(folder.glob("*.cubin")) if folder.is_dir() else []
    console.print(f"Compiled kernels: {folder} ({len(kernels)} kernels, {sum(k.stat().st_size for k in kernels) / 2**20:.1f} MiB); "
                  "set FTOPS_CACHE to move it", soft_wrap=True, markup=False)

    if torch.cuda.is_available():
        file, weights = known(torch.cuda.current_device())
        console.print(f"Measured linear layers: {file} ({weights} weights); `ftops tune MODEL` measures those of a model", soft_wrap=True,
                      markup=False)

    table = Table(title="ftops.ops" if not missing else "ftops.ops (a GPU is not usable here)", title_justify="left")
    for column in ("op", "on a GPU", "on the CPU"):
        table.add_column(column, overflow="fold")
    for name in OPS:
        table.add_row(name, kernel_file(name) or "no kernel in this version: raises",
                      getattr(op_module(name), "ON_CPU", "PyTorch"))
    console.print(table)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
