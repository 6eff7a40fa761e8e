"""What a measurement depends on, beside the code: the device and the versions."""
from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from ftops.info import installed

PACKAGES = ("torch", "transformers", "numba-cuda", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """The device's name, and the versions of what runs on it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        extra = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version()), "driver": _driver() or "unknown"}
    else:
        name, extra = f"CPU {_cpu_name()}", {"threads": str(torch.get_num_threads())}
    versions = {package: version for package in PACKAGES if (version := installed(package))}
    return {"device": name, "python": platform.python_version(), **versions, **extra}


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    except OSError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.machine()
