"""python -m bench.trace [--batch 1] [--context 128] [--quant int8]: where the time of a decode step of Llama-3.1-8B's shapes goes.

Profiles replays of the captured step and writes bench/results/<device>/trace_<what>.md: launches and time of each kernel, and the floor.
"""
from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import ftops
from bench.record import RESULTS, commit, slug, today
from bench.test_models import llama_8b, step_bytes
from ftops.machine import machine

WARM, STEPS = 8, 16  # of those the profiler sees the last; one runs ahead of what is read
OTHERS = {"cuBLAS": ("nvjet", "gemm", "gemv", "cutlass", "splitk"), "PyTorch, indexing": ("index", "gather", "scatter"),
          "PyTorch, reductions": ("reduce",), "PyTorch, elementwise": ("elementwise",), "copies": ("memcpy", "memset")}


def kind(name: str) -> str:
    """What a reader calls the kernel of this symbol."""
    ours = re.search(r"numba_kernels(\d+)(\w+)", name)
    if ours:
        return f"ftops {ours[2][: int(ours[1])]}"
    return next((called for called, parts in OTHERS.items() if any(part in name.lower() for part in parts)), name[:60])


def table(kernels: list[tuple[str, float, float]], steps: int) -> list[str]:
    """Markdown of (symbol, start and end in seconds): by kind, longest first, and the time between kernels."""
    time, count = defaultdict(float), defaultdict(int)
    for name, start, end in kernels:
        time[kind(name)] += end - start
        count[kind(name)] += 1
    begin, finish, busy, reached = min(k[1] for k in kernels), max(k[2] for k in kernels), 0.0, 0.0
    for _, start, end in sorted(kernels, key=lambda k: k[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = (finish - begin) / steps
    lines = ["| | launches a step | us a step | share |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {count[name] / steps:.4g} | {time[name] / steps * 1e6:.1f} | {time[name] / steps / whole:.1%} |"
              for name in sorted(time, key=time.__getitem__, reverse=True)]
    return [*lines, f"| nothing runs | | {(whole - busy / steps) * 1e6:.1f} | {1 - busy / steps / whole:.1%} |",
            f"| a step | {len(kernels) / steps:.4g} | {whole * 1e6:.1f} | |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--quant")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    model = ftops.patch(llama_8b(), quant=given.quant)
    device = model.device
    ids = torch.randint(3, model.config.vocab_size, (given.batch, given.context), device=device)
    running = iter(ftops.stream(model, ids, max_new_tokens=WARM + STEPS + 4, eos_token_id=[]))
    for _ in range(WARM):
        next(running)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            next(running)
        torch.cuda.synchronize(device)
    kernels = [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in seen.events()
               if event.device_type == torch.autograd.DeviceType.CUDA]
    bytes_read = step_bytes(model)
    facts = machine(device)
    head = (f"A decode step of Llama-3.1-8B's shapes, random {given.quant or 'bfloat16'} weights, batch {given.batch}, behind "
            f"{given.context} tokens. {today()}, commit {commit()}, {facts['device']}, torch {facts['torch']}, driver {facts['driver']}. "
            f"Floor: {bytes_read / 1e9:.2f} GB of weights, {bytes_read / 4.5e12 * 1e3:.2f} ms at 4.5 TB/s.")
    file = given.results / slug(facts["device"]) / f"trace_{given.quant or 'bf16'}_batch{given.batch}_context{given.context}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([head, "", *table(kernels, STEPS), ""]))
    print(file.read_text(), f"written: {file}", sep="\n")


if __name__ == "__main__":
    main()
