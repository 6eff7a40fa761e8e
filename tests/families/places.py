"""Where the family tests run: the same bodies on the CPU and, with -m gpu, on every CUDA device."""
from __future__ import annotations

import pytest
import torch

FLOAT32 = pytest.param("cpu", torch.float32, id="cpu-float32")
GPU = [pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
       for dtype in (torch.float16, torch.bfloat16, torch.float32)]
SECOND_GPU = pytest.param("cuda:1", torch.float16, id="second_gpu", marks=[
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")])

EVERYWHERE = pytest.mark.parametrize(("device", "dtype"), [
    FLOAT32, pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"), *GPU, SECOND_GPU])
# Tokens are compared one by one only where the dtype leaves no doubt about the largest logit.
IN_FLOAT32 = pytest.mark.parametrize(("device", "dtype"), [FLOAT32, GPU[-1]])
