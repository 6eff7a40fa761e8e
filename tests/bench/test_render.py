"""docs/benchmarks.md says what the results say: losses like wins, reasons of what is missing, and nothing stale."""
from __future__ import annotations

import copy

import pytest

from bench.record import OURS, ROOT, Ceilings, Record, figures, save, slug
from bench.render import DOCS, bars, document, duration, load, main, plot, plot_name

CEILINGS = Ceilings(copy=3e12, read=4e12, matmul=700e12)
FACTS = {"device": "NVIDIA H200", "python": "3.12", "torch": "2.11"}


def record(name: str = "1,32,8,1024,128", ours: float = 10e-6, **peers: float) -> Record:
    return Record("ops", "decode_attention", name, {OURS: ours, **peers}, bytes=4e6, flops=1e6, commit="abc", date="2026-01-02")


@pytest.fixture
def results(tmp_path):
    """A win, a loss, and a peer that cannot."""
    loss = record("64,32,8,4096,128", 20e-6, cuDNN=10e-6)
    loss.missing["flash"] = "RuntimeError: no kernel"
    save(tmp_path, "ops", FACTS, CEILINGS, [record(cuDNN=15e-6, flash=30e-6), loss])
    return load(tmp_path)


def rows(text: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for line in text.splitlines() if line.startswith("| ")
            for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}


def test_wins_and_losses_stand_in_the_same_table(results):
    table = rows(document(results))
    assert table["decode_attention"] == ["ftops", "rate", "of the ceiling", "cuDNN", "flash"]
    assert table["1,32,8,1024,128"] == ["10 us", "0.4 TB/s", "10%", "15 us (1.50 x)", "30 us (3.00 x)"]
    assert table["64,32,8,4096,128"] == ["20 us", "0.2 TB/s", "5%", "10 us (0.50 x)", "cannot"]


def test_what_is_missing_has_its_reason(results):
    assert "* flash, 64,32,8,4096,128: RuntimeError: no kernel" in document(results)


def test_device_versions_commit_date_and_ceilings_are_named(results):
    text = document(results)
    for fact in ("## NVIDIA H200", "torch 2.11", "2026-01-02, commit abc", "copy 3 TB/s", "read 4 TB/s", "matrix product 700 TFLOP/s"):
        assert fact in text


def test_the_rate_is_of_what_binds():
    """Memory where bytes take longer, arithmetic where operations do."""
    as_dict = vars(record())
    assert figures(as_dict, vars(CEILINGS))["rate"] == "0.4 TB/s"
    assert figures(as_dict | {"flops": 3.5e9}, vars(CEILINGS)) == {"rate": "350 TFLOP/s", "share": pytest.approx(0.5), "ratios": {}}
    assert figures(as_dict | {"flops": 0.0, "bytes": 0.0}, vars(CEILINGS))["rate"] == ""


def test_another_run_renews_what_it_measured_and_keeps_the_rest(tmp_path):
    save(tmp_path, "ops", FACTS, CEILINGS, [record("a"), record("b")])
    save(tmp_path, "ops", FACTS, CEILINGS, [record("b", ours=5e-6)])
    kept = {r["name"]: r["seconds"][OURS] for r in load(tmp_path)["h200"]["ops"]["records"]}
    assert kept == {"a": 10e-6, "b": 5e-6}


def test_another_machine_or_version_begins_anew(tmp_path):
    """Numbers of two versions of torch in one table would compare what cannot be compared."""
    save(tmp_path, "ops", FACTS, CEILINGS, [record("a")])
    save(tmp_path, "ops", FACTS | {"torch": "2.12"}, CEILINGS, [record("b")])
    assert [r["name"] for r in load(tmp_path)["h200"]["ops"]["records"]] == ["b"]


def test_devices_have_a_folder_each():
    assert [slug(name) for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "CPU Intel(R) Xeon(R)")] == [
        "h200", "h100_80gb_hbm3", "cpu_intel_r_xeon_r"]


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.00382, "3.82 ms"), (12.34e-6, "12.3 us"), (0.4e-6, "0.4 us")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_plot_shows_the_fastest_peer(results, tmp_path):
    """Against a slow one every op would look good; ftops in another mode is no peer."""
    content = copy.deepcopy(results["h200"]["ops"])
    content["records"][0]["seconds"]["ftops, compiled"] = 1e-6
    assert [(ratio, peer) for _, ratio, peer in bars(content)] == [(1.5, "cuDNN"), (0.5, "cuDNN")]
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plot(content, first)
    plot(content, second)
    assert first.read_bytes() == second.read_bytes()  # rendering again changes nothing in the repository
    assert "0.50 x cuDNN" in first.read_text()


def test_linear_layers_are_plotted_over_rows(tmp_path):
    pytest.importorskip("matplotlib")
    records = [Record("linear", f"{op} 64x32", str(rows), {OURS: 1e-6, "torch": 2e-6}) for op in ("linear", "linear_w8a16")
               for rows in (16, 1)]
    save(tmp_path, "linear", FACTS, CEILINGS, records)
    plot(load(tmp_path)["h200"]["linear"], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert all(word in drawn for word in ("linear_w8a16", "64x32", "rows", ">16<"))


def test_main_writes_document_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    save(tmp_path / "results", "ops", FACTS, CEILINGS, [record(cuDNN=15e-6)])
    main(tmp_path / "results", tmp_path)
    assert plot_name("h200", "ops") in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / plot_name("h200", "ops")).is_file()


def test_the_committed_document_is_rendered_from_the_committed_results():
    """A figure typed by hand, or results without their document, fails here: run python -m bench.render."""
    found = load()
    assert (DOCS / "benchmarks.md").read_text() == document(found)
    wanted = {plot_name(device, suite) for device, suites in found.items() for suite, content in suites.items()
              if suite != "host" and bars(content)}
    assert {file.name for file in (ROOT / "docs").glob("benchmarks*.svg")} == wanted
