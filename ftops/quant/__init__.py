"""Weight formats: `ftops.quant.FORMATS["int4"].quantize(weight)`. A file a format: quantize, dequantize, linear, shard.

A new format is one file here and one line below.
"""
from __future__ import annotations

from types import ModuleType

from ftops.quant import fp8, int4, int8, w8a8
from ftops.quant.weight import QuantizedWeight

FORMATS: dict[str, ModuleType] = {
    "int4": int4,
    "int8": int8,
    "fp8": fp8,
    "w8a8": w8a8,
}

__all__ = ["FORMATS", "QuantizedWeight"]
