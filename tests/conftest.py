"""What every test stands on: no network, one seed, few threads, and GPU tests only where there is a GPU."""
from __future__ import annotations

import logging
import os

# Before torch or transformers are imported, and for the programs that tests start: no download, and workers share the machine's cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else Inductor compiles for 6 s to see whether the processor has what it says
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    # Set, not left if there: a worker inherits what the process that starts it has. Threads of several workers on one core wait for one
    # another in a loop, and a model's forward then takes ten times as long.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each worker starts as many processes as there are cores
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))

import pytest  # noqa: E402
import torch  # noqa: E402

# torch.compile traces at DEBUG whatever the level asked for; caught by pytest it buries the failure.
logging.getLogger("torch.__trace").propagate = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo() -> None:
    """Compiled code and counters of earlier tests are forgotten."""
    torch._dynamo.reset()
