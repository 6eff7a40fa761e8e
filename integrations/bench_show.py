"""The table, the file and the plot of `ftops bench`."""
from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ftops import __version__
from ftops.integrations.bench import BASELINE, COMPILED, OURS, Bench, Run
from ftops.machine import machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")
COLOURS = {BASELINE: "#7f7f7f", COMPILED: "#e6862b", OURS: "#1f6fb4"}


def check_files(table: str | Path | None, plot: str | Path | None) -> None:
    """Before anything is measured: the folders are there, and what draws is installed and knows the plot's ending. Raises ValueError."""
    for file in filter(None, (table, plot)):
        if not Path(file).expanduser().absolute().parent.is_dir():
            raise ValueError(f"bench: {file} cannot be written: {Path(file).expanduser().absolute().parent} is no folder; make it first")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("bench: --plot needs matplotlib, which is not installed; pip install 'ftops[bench]'")
    if plot is not None and Path(plot).suffix not in ENDINGS:
        raise ValueError(f"bench: --plot is {plot}; allowed: a file that ends in {', '.join(ENDINGS)}")


def speed(run: Run, found: Bench) -> float | None:
    """Hugging Face's time a token over that of `run`, at the same batch and context: above 1 is faster."""
    theirs = next(one for one in found.runs if (one.side, one.batch, one.context) == (BASELINE, run.batch, run.context))
    return None if theirs.missing or run.missing else theirs.token / run.token


def title(found: Bench) -> str:
    facts = machine(found.device)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "cuda") if facts.get(name))
    count = f"{found.parameters / 1e9:.3g} B" if found.parameters >= 1e9 else f"{found.parameters / 1e6:.3g} M"
    return f"{found.model}, {count} parameters in {found.dtype}, {facts['device']}, {versions}, ftops {__version__}"


def show(console: Console, found: Bench) -> None:
    on_gpu = found.device.type == "cuda"
    unit, size = ("GiB", 2**30) if max(run.memory for run in found.runs) >= 2**30 else ("MiB", 2**20)
    console.print(title(found), markup=False, highlight=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("batch", "context", "run", "first\nms", "a token\nms", "tokens/s", "speed",
                   f"{'GPU' if on_gpu else 'weights'}\n{unit}", "same"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column != "run", overflow="fold")
    place = None
    for run in found.runs:
        new = (run.batch, run.context) != place
        if new and place is not None:
            table.add_section()
        place = run.batch, run.context
        names = (str(run.batch), f"{run.context:,}", run.side) if new else ("", "", run.side)
        if run.missing:
            table.add_row(*names[:2], f"{run.side}: {run.missing}")
            continue
        ratio = speed(run, found)
        colour = "" if ratio is None or run.side == BASELINE else "[green]" if ratio >= 1 else "[red]"
        table.add_row(*names, f"{1e3 * run.first:,.1f}", f"{1e3 * run.token:,.2f}", f"{run.rate:,.0f}",
                      "" if ratio is None else f"{colour}{ratio:.2f} x", f"{run.memory / size:,.1f}",
                      "" if run.equal is None or run.side == BASELINE else f"{run.equal:.0%}")
    console.print(table)
    console.print(
        f"Greedy, {found.new_tokens} new tokens a row; medians of {found.repeats} runs in turns, warm, by the host's clock. first: until "
        "the first token; a token: a step after it; tokens/s: of all rows in these steps. speed: Hugging Face's time a token over this "
        "one, above 1 is faster. same: tokens before a row's first one that is not Hugging Face's"
        f"{f'; {found.quant} is another model' if found.quant else ', where two logits may be all but equal'}.", highlight=False)
    for remark in found.remarks:
        console.print(remark, markup=False, highlight=False)


def write(found: Bench, file: str | Path) -> None:
    """All figures, in seconds and bytes, as JSON."""
    about: dict[str, Any] = {**vars(found), "device": str(found.device), "machine": machine(found.device), "ftops": __version__}
    about["runs"] = [asdict(run) for run in found.runs]
    Path(file).expanduser().write_text(json.dumps(about, indent=1) + "\n")


def draw(found: Bench, file: str | Path) -> None:
    """In the format that the file's ending says, one of ENDINGS."""
    figure(found).savefig(Path(file).expanduser(), dpi=150)


def figure(found: Bench) -> Figure:
    """Tokens a second against batch, a panel a context, and below against context, a panel a batch; of one size alone, bars."""
    from matplotlib.figure import Figure
    values = {name: sorted({getattr(run, name) for run in found.runs if not run.missing}) for name in ("batch", "context")}
    rows = [(name, other) for name, other in (("batch", "context"), ("context", "batch")) if len(values[name]) > 1]
    columns = max((len(values[other]) for _, other in rows), default=1)
    drawn = Figure(figsize=(max(2.9 * columns + 0.8, 6.4), 1.6 + 2.8 * (len(rows) or 0.5)), layout="constrained")
    if rows:
        panels = drawn.subplots(len(rows), columns, squeeze=False, sharey=True)
        for line, (name, other) in zip(panels, rows, strict=True):
            for axes, value in zip_longest(line, values[other]):
                if value is None:
                    axes.set_visible(False)
                    continue
                _lines(axes, found, name, other, value)
                _scales(axes, values[name])
            line[0].set_ylabel("tokens a second")
        handles, labels = panels[0][0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    else:
        _bars(drawn.subplots(), found)
    name, _, facts = title(found).partition(", ")
    drawn.suptitle(f"{name}: tokens a second of all rows together, greedy\n\n", fontsize=11)
    drawn.text(0.5, 1 - 0.45 / drawn.get_figheight(), facts, fontsize=7.5, color="#555555", ha="center")
    return drawn


def _lines(axes: Axes, found: Bench, name: str, other: str, value: int) -> None:
    for side in dict.fromkeys(run.side for run in found.runs):
        points = sorted((getattr(run, name), run.rate) for run in found.runs
                        if run.side == side and getattr(run, other) == value and not run.missing)
        axes.plot([x for x, _ in points], [y for _, y in points], color=_colour(side), marker="o", markersize=4, label=side)
        if points:
            axes.annotate(f"{points[-1][1]:,.0f}", points[-1], (5, 0), textcoords="offset points", color=_colour(side), fontsize=7.5,
                          va="center")
    axes.set_title(f"{other} {value:,}", fontsize=9)
    axes.set_xlabel("batch" if name == "batch" else "context, tokens", fontsize=9)
    axes.margins(x=0.2)


def _scales(axes: Axes, measured: list[int]) -> None:
    """Both logarithmic: twice the batch at twice the rate is a straight line. Ticks where something was measured."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    axes.set_xscale("log", base=2)
    axes.set_xticks(measured, [f"{value:,}" for value in measured])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    _plain(axes)


def _bars(axes: Axes, found: Bench) -> None:
    shown = [run for run in found.runs if not run.missing][::-1]
    axes.barh([run.side for run in shown], [run.rate for run in shown], color=[_colour(run.side) for run in shown], height=0.6)
    for place, run in enumerate(shown):
        axes.annotate(f" {run.rate:,.0f}", (run.rate, place), va="center")
    one = (shown or found.runs)[0]
    axes.set_xlabel(f"tokens a second, batch {one.batch:,}, context {one.context:,}")
    axes.margins(x=0.15)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _colour(side: str) -> str:
    return COLOURS[side if side in COLOURS else OURS]
