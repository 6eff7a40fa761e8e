"""python -m bench.render: docs/benchmarks.md and its plots, out of bench/results/<device>/<suite>.json and nothing else."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.record import OURS, RESULTS, ROOT, figures, slug

DOCS = ROOT / "docs"
SUITES = {"attention": "Attention", "linear": "Linear layers", "ops": "Other ops", "models": "Whole models", "generation": "Generation",
          "quantised": "Quantised models", "host": "Host side"}
HEAD = """# Benchmarks

Rendered by `python -m bench.render` from [`bench/results`](../bench/results); nothing here is typed by hand.
`make bench` measures your machine and prints the same figures; `pytest bench --benchmark-only --results FOLDER` keeps them,
and `-k` picks some, as in `-k decode_attention`, `-k "w4a16 and 6144x4096 and -16]"` or `-k "Llama and 16"`.

FlashInfer, gemlite and torchao are measured beside the others where they are installed (`pip install flashinfer-python gemlite torchao`);
FlashInfer compiles its kernels on first use, which takes minutes. A peer that cannot run, or whose answer is wrong, is not timed, and the
reason stands below the table.

All sides of a row were measured in one process on one device, in turns, and the median of the rounds is given. Ops are timed on the
device: calls on different inputs are captured as one CUDA graph, the L2 cache is overwritten before each replay, the inputs are
random bfloat16, and the timed output is checked against a float32 result before. Host costs and whole models are timed by the host's
clock, synchronised, everything included. "Of the ceiling" compares with what this device did in the same run: 1 GiB copied or read,
whichever was faster, or a bfloat16 matrix product of 8192, whichever binds. In brackets behind a peer: its time over ours, so that
**above 1 ftops is faster, below 1 slower**.
"""


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def cell(seconds: float, ratio: float) -> str:
    return f"{duration(seconds)} ({ratio:.2f} x)"


def told(ceilings: dict[str, float]) -> str:
    return (f"copy {ceilings['copy'] / 1e12:.3g} TB/s, read {ceilings['read'] / 1e12:.3g} TB/s, "
            f"matrix product {ceilings['matmul'] / 1e12:.3g} TFLOP/s")


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The files by device and suite, in the order of SUITES."""
    found: dict[str, dict[str, Any]] = {}
    for suite in SUITES:
        for file in sorted(folder.glob(f"*/{suite}.json")):
            found.setdefault(file.parent.name, {})[suite] = json.loads(file.read_text())
    return dict(sorted(found.items()))


def table(records: list[dict[str, Any]], ceilings: dict[str, float]) -> list[str]:
    """One group: a row a problem, a column a peer. What a peer cannot do is said below."""
    peers = list(dict.fromkeys(name for record in records for name in (*record["seconds"], *record["missing"]) if name != OURS))
    rated = any(figures(record, ceilings)["rate"] for record in records)
    head = [records[0]["group"], OURS, *(["rate", "of the ceiling"] if rated else []), *peers]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    notes: dict[str, None] = {}
    for record in records:
        figured = figures(record, ceilings)
        cells = [record["name"], duration(record["seconds"][OURS])]
        if rated:
            cells += [figured["rate"], f"{figured['share']:.0%}" if figured["rate"] else ""]
        for peer in peers:
            if peer in record["missing"]:
                notes[f"{peer}, {record['name']}: {record['missing'][peer]}"] = None
            cells.append(cell(record["seconds"][peer], figured["ratios"][peer]) if peer in record["seconds"] else
                         "cannot" if peer in record["missing"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"* {note}" for note in notes), *([""] if notes else [])]


def section(device: str, suites: dict[str, Any]) -> list[str]:
    facts = next(iter(suites.values()))["machine"]
    lines = [f"## {facts['device']}", ""]
    for suite, content in suites.items():
        versions = ", ".join(f"{name} {value}" for name, value in content["machine"].items() if name != "device")
        runs = sorted({(record["date"], record["commit"]) for record in content["records"]})
        lines += [f"### {SUITES[suite]}", "",
                  f"{'; '.join(f'{day}, commit {commit}' for day, commit in runs)}. {versions}. Ceilings: {told(content['ceilings'])}.", ""]
        if plotted(suite, content):
            lines += [f"![Best peer's time over ours]({plot_name(device, suite)})", ""]
        groups: dict[str, list[dict[str, Any]]] = {}
        for record in content["records"]:
            groups.setdefault(record["group"], []).append(record)
        for records in groups.values():
            lines += table(records, content["ceilings"])
    return lines


def document(results: dict[str, dict[str, Any]]) -> str:
    lines = [HEAD]
    for device, suites in results.items():
        lines += section(device, suites)
    if not results:
        lines += ["No results are committed yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def plot_name(device: str, suite: str) -> str:
    return f"benchmarks_{slug(device)}_{suite}.svg"


def bars(content: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(problem, time of the fastest peer over ours, that peer), without ftops in another mode; problems without a peer are left out."""
    found = []
    for record in content["records"]:
        ratios = {peer: ratio for peer, ratio in figures(record, content["ceilings"])["ratios"].items() if not peer.startswith(OURS)}
        if ratios:
            peer = min(ratios, key=ratios.__getitem__)
            found.append((f"{record['group']}: {record['name']}", ratios[peer], peer))
    return found


def plotted(suite: str, content: dict[str, Any]) -> bool:
    """Host costs are no race, and a suite may have no peer but ours in another mode."""
    return suite != "host" and bool(bars(content))


def plot(content: dict[str, Any], file: Path) -> None:
    """Where wins over the fastest peer lie on one side of 1, losses on the other."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "ftops", "svg.fonttype": "none", "font.size": 8})
    figure = (curves_figure if content["suite"] == "linear" else bars_figure)(plt, content)
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def ticks(most: float) -> tuple[list[float], list[str]]:
    shown = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10) if tick < 2 * most]
    return shown, [f"{tick:g} x" for tick in shown]


def bars_figure(plt: Any, content: dict[str, Any]) -> Any:
    """A bar a problem, to the right of 1 where ftops is faster."""
    rows = bars(content)[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.19 * len(rows)))
    axes.barh(range(len(rows)), [ratio - 1 for _, ratio, _ in rows], left=1,
              color=["tab:green" if ratio >= 1 else "tab:red" for _, ratio, _ in rows])
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_xscale("log")
    axes.set_xticks(*ticks(max(ratio for _, ratio, _ in rows)))
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_title(f"{content['machine']['device']}: time of the fastest peer over that of ftops (right of 1: ftops is faster)", fontsize=8)
    for place, (_, ratio, peer) in enumerate(rows):
        axes.annotate(f" {ratio:.2f} x {peer}", (max(ratio, 1), place), va="center", fontsize=6)
    axes.set_xlim(right=max(axes.get_xlim()[1] * 1.6, 3))  # room for the labels
    return figure


def curves_figure(plt: Any, content: dict[str, Any]) -> Any:
    """A panel an op, a line a shape of weights, over the number of rows; above 1 where ftops is faster."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, ratio, _ in bars(content):
        op, shape, rows = name.replace(":", "").split()
        lines.setdefault(op, {}).setdefault(shape, []).append((int(rows), ratio))
    figure, panels = plt.subplots(len(lines), 1, figsize=(8, 2.2 * len(lines)), sharex=True, squeeze=False)
    for (op, shapes), axes in zip(lines.items(), panels[:, 0], strict=True):
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for shape, points in shapes.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=shape)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        counts = sorted({rows for points in shapes.values() for rows, _ in points})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_yticks(*ticks(max(ratio for points in shapes.values() for _, ratio in points)))
        axes.minorticks_off()
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(op)
    panels[-1, 0].set_xlabel("rows")
    panels[0, 0].legend(title="weights, N x K", fontsize=6, ncols=2)
    panels[0, 0].set_title(
        f"{content['machine']['device']}: time of the fastest peer over that of ftops (above 1: ftops is faster)", fontsize=8)
    return figure


def main(results: Path = RESULTS, docs: Path = DOCS) -> None:
    found = load(results)
    (docs / "benchmarks.md").write_text(document(found))
    for device, suites in found.items():
        for suite, content in suites.items():
            if plotted(suite, content):
                plot(content, docs / plot_name(device, suite))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
