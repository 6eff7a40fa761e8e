"""What `ftops tune` does: measures the candidates for a model's own linear layers on this GPU, and keeps the winners for later processes.

Only the model's configuration is read; the weights are random, since time does not depend on them.
"""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ftops.integrations.demo.load import EMBEDDED
from ftops.integrations.transformers.arch import follow
from ftops.integrations.transformers.archs import ARCHS
from ftops.ops.candidates import OF_FORMAT, keep, measured_rows
from ftops.progress import bar
from ftops.timing import Stopwatch
from ftops.tune import Choice, random_weight, tune, winners

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN = "none"  # weights as they are, of 16 bits


def tune_model(model: str | Path | None = None, formats: list[str] | None = None, *, device: str | None = None,
               dtype: str | None = None) -> tuple[list[Choice], Path]:
    """Measures the shapes of `model` (a folder or a hub id; None is the embedded one) in each format; the winners, and their file.

    formats: "none" (16 bits, the default), int8, int4, fp8, w8a8. Raises ValueError.
    """
    allowed = [PLAIN, *filter(None, OF_FORMAT)]
    for name in formats or []:
        if name not in allowed:
            raise ValueError(f"tune: --quant is {name}; allowed: {', '.join(allowed)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"tune: --dtype is {dtype}; allowed: {', '.join(DTYPES)}: there is nothing to choose in float32")
    if device is not None and re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise ValueError(f"tune: --device is {device}; allowed: cuda, cuda:1 and so on: a CPU has one way to compute each linear layer")
    if not torch.cuda.is_available():
        raise ValueError("tune: PyTorch finds no CUDA device, and there is nothing to tune without one; `ftops info` says what is missing")
    place = torch.device(device or "cuda")
    place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
    shapes, own = shapes_of(model or EMBEDDED)
    of_x = DTYPES.get(dtype or own, torch.bfloat16)
    asked = dict.fromkeys(None if name == PLAIN else name for name in formats or [PLAIN])
    choices: list[Choice] = []
    with torch.cuda.device(place), bar("", len(asked) * len(shapes) * len(measured_rows())) as advance:
        stopwatch = Stopwatch(place)
        for name in asked:
            for N, K in shapes:
                advance(0, f"{name or of_x} {N}x{K}")
                known = {(choice.problem, choice.rows) for choice in choices}  # w8a8 multiplies few rows as int8 does
                choices += tune(random_weight(name, N, K, of_x, place), stopwatch, advance=advance, known=known)
                torch.cuda.empty_cache()
    try:
        return choices, keep(place.index, winners(choices))
    except OSError as error:
        raise ValueError(f"tune: the winners cannot be kept: {error}; set FTOPS_CACHE to a folder that can be written") from None


def shapes_of(model: str | Path) -> tuple[list[tuple[int, int]], str]:
    """The distinct [N, K] of the linears of its fused layers (q, k, v together, gate and up too), and its dtype. Raises ValueError."""
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            made = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"tune: MODEL is {str(model)!r}, whose configuration could not be read: {' '.join(str(error).split())}\n"
                         "Pass a folder or a hub id with a config.json of an architecture that transformers has built in.") from error
    found: dict[tuple[int, int], None] = {}
    for layer in made.modules():
        for arch in ARCHS.values():
            if arch.matches(layer):
                for group in (arch.qkv, (arch.out,), arch.up, (arch.down,)):
                    sizes = [_oriented(follow(layer, path)) for path in group]
                    found[sum(N for N, _ in sizes), sizes[0][1]] = None
    if not found:
        raise ValueError(f"tune: MODEL is {str(model)!r}, a {type(made).__name__}, whose linear layers stay PyTorch's own; "
                         f"fused are those of {', '.join(ARCHS)}")
    return list(found), str(getattr(config, "dtype", None)).removeprefix("torch.")


def _oriented(linear: nn.Module) -> tuple[int, int]:
    N, K = linear.weight.shape
    return (K, N) if isinstance(linear, Conv1D) else (N, K)


def show(console: Console, choices: list[Choice], file: Path) -> None:
    """A table a format: time and name of the winner, and how much longer the choice without a measurement takes."""
    for op in dict.fromkeys(choice.problem.rpartition(" ")[0] for choice in choices):
        mine = [choice for choice in choices if choice.problem.rpartition(" ")[0] == op]
        table = Table(title=op, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("N x K", "rows", "us", "winner", "untuned"):
            table.add_column(column, justify="left" if column == "winner" else "right", overflow="fold", no_wrap=column != "winner")
        before = None
        for choice in mine:
            shape = choice.problem.rpartition(" ")[2]
            if before not in (None, shape):
                table.add_section()
            colour = "" if choice.loss <= 1.1 else "[yellow]"
            table.add_row(shape if shape != before else "", str(choice.rows), f"{1e6 * choice.seconds[choice.winner]:.1f}", choice.winner,
                          f"{colour}{choice.loss:.2f} x")
            before = shape
        console.print(table)
    if not choices:
        console.print("There was nothing to choose: no kernel of ftops takes weights of these sizes.")
        return
    near = sum(choice.loss <= 1.1 for choice in choices)
    worst = max(choices, key=lambda choice: choice.loss)
    console.print(f"untuned: the time of what is taken without a measurement over the winner's. At most 1.10 x in {near} of "
                  f"{len(choices)}; the worst {worst.loss:.2f} x, {worst.problem} at {worst.rows} rows.", highlight=False)
    reasons = Counter(f"{name}: {reason}" for choice in choices for name, reason in choice.refused.items())
    for reason, times in reasons.items():
        console.print(f"refused {times} times: {reason}", markup=False, highlight=False)
    console.print(f"kept for later processes: {file}", markup=False, highlight=False, soft_wrap=True)
