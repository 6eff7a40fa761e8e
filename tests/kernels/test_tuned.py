"""Measured winners: what one process has kept another takes, and a file that cannot be trusted changes nothing but a line in the log."""
from __future__ import annotations

import json
import logging

import pytest
import torch

from ftops.numba_kernels import linear, linear_w4a16, tuned
from ftops.numba_kernels import linear_sm90_launch as hopper
from ftops.numba_kernels.tuned import LIBRARY, ROWS, chosen, file_of, keep, name_of, problem, takes, winner

GPU = "NVIDIA H200"
OF_LINEAR = problem("linear", torch.bfloat16, 6144, 4096)
FIRST = linear.pick("16-bit", "bfloat16", 4)
OTHER = list(linear.candidates("16-bit", "bfloat16", 4).values())[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache and a GPU with a name."""
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    forget()
    yield tmp_path / "tuned"
    forget()


def forget():
    tuned.forget()
    linear._takes.cache_clear()
    linear_w4a16._takes.cache_clear()
    hopper._takes.cache_clear()
    hopper._picked.cache_clear()


def test_what_was_kept_is_taken(cache):
    assert winner(OF_LINEAR, 4, 0) is None
    assert keep(0, {OF_LINEAR: {4: "a", 8192: LIBRARY}}) == cache / "nvidia_h200.json"
    assert [path.name for path in cache.iterdir()] == ["nvidia_h200.json"]
    assert (winner(OF_LINEAR, 4, 0), winner(OF_LINEAR, 8192, 0), winner(OF_LINEAR, 8, 0)) == ("a", LIBRARY, None)
    assert winner(problem("linear", torch.float16, 6144, 4096), 4, 0) is None


def test_rows_in_between_go_by_the_next_that_was_measured():
    keep(0, {OF_LINEAR: {rows: f"of {rows}" for rows in ROWS}})
    assert [winner(OF_LINEAR, rows, 0) for rows in (1, 3, 4, 5, 100, 8192, 100000)] == [
        "of 1", "of 4", "of 4", "of 8", "of 128", "of 8192", "of 8192"]


def test_another_model_adds_to_what_is_known_and_a_new_measurement_renews_it():
    keep(0, {OF_LINEAR: {1: "a", 2: "a"}})
    keep(0, {OF_LINEAR: {2: "b"}, "another": {1: "c"}})
    assert (winner(OF_LINEAR, 1, 0), winner(OF_LINEAR, 2, 0), winner("another", 1, 0)) == ("a", "b", "c")


def changed(**parts):
    return lambda content: json.dumps({**content, **parts}).encode()


BROKEN = {
    "cut_short": lambda content: json.dumps(content).encode()[:-40], "empty": lambda content: b"",
    "binary": lambda content: b"\x00\xff" * 99,
    "another_json": lambda content: b"[1, 2]", "deep": lambda content: b"[" * 100000, "no_winners": changed(winners=None),
    "another_gpu": changed(gpu="NVIDIA A100"), "another_format": changed(format=2), "other_kernels": changed(sources="0" * 40),
    "another_torch": changed(versions={"torch": "1.0", "cuda": None}), "rows": changed(winners={OF_LINEAR: {"3": "a"}}),
    "names": changed(winners={OF_LINEAR: {"4": ["rm", "-rf"]}}), "by_rows": changed(winners={OF_LINEAR: 4}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_trusted_is_not_used_and_that_is_said_once(how, caplog):
    path = keep(0, {OF_LINEAR: {4: "a"}})
    path.write_bytes(BROKEN[how](json.loads(path.read_text())))
    tuned.forget()
    with caplog.at_level(logging.WARNING, logger="ftops"):
        assert [winner(OF_LINEAR, 4, 0), winner("another", 1, 0), winner(OF_LINEAR, 4, 0)] == [None] * 3
    assert len(caplog.records) == 1 and str(path) in caplog.text and "ftops tune makes it anew" in caplog.text
    keep(0, {OF_LINEAR: {4: "b"}})
    assert winner(OF_LINEAR, 4, 0) == "b"


def test_a_folder_in_its_place_is_no_crash(cache, caplog):
    file_of(GPU).mkdir(parents=True)
    assert winner(OF_LINEAR, 4, 0) is None
    assert len(caplog.records) == 1


def test_where_it_cannot_be_written_the_user_hears_of_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTOPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError):
        keep(0, {OF_LINEAR: {1: "a"}})


def test_the_file_is_read_once(monkeypatch):
    path = keep(0, {OF_LINEAR: {4: "a"}})
    assert winner(OF_LINEAR, 4, 0) == "a"
    path.unlink()
    assert winner(OF_LINEAR, 4, 0) == "a"


def test_another_source_of_a_kernel_is_another_key(monkeypatch, tmp_path):
    for name in ("linear.py", "tuned.py"):
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    tuned._sources.cache_clear()
    before = tuned._key(GPU)
    (tmp_path / "linear.py").write_text("two")
    tuned._sources.cache_clear()
    assert tuned._key(GPU)["sources"] != before["sources"]
    tuned._sources.cache_clear()


def test_names_tell_candidates_apart():
    """The winner of a file is looked for by its name, whose first word is the kernel's."""
    for kernel, offered in (*(("linear", linear.candidates(kind, "bfloat16", rows)) for kind in linear.BATCHES for rows in (1, 16, 100)),
                            *(("linear_w4a16", linear_w4a16.candidates("float16", rows, size)) for rows in (1, 100) for size in (32, 128)),
                            *(("linear_sm90", hopper.candidates("int8", "float16", rows, 512, 4096, 0)) for rows in (64, 8192))):
        assert len({str(config) for config in offered.values()}) == len(offered) >= 2
        assert all(name.startswith(f"{kernel}: ") for name in offered)
    assert name_of("linear", FIRST) == "linear: batch 8, warps 4, stages 2"


def test_a_name_that_no_candidate_has_changes_nothing():
    keep(0, {OF_LINEAR: {4: "linear: batch 999, warps 4, stages 2"}})
    assert chosen(OF_LINEAR, 4, 0, linear.candidates("16-bit", "bfloat16", 4)) == FIRST


@pytest.fixture
def planned(monkeypatch):
    """The configuration with which a kernel of linear is loaded, without a GPU."""
    for module in (linear, linear_w4a16):
        module._kernel.cache_clear()
        monkeypatch.setattr(module, "spread", lambda *_: (1, 0))
        monkeypatch.setattr(module, "load", lambda spec, device: spec.config)
    yield
    for module in (linear, linear_w4a16):
        module._kernel.cache_clear()


def test_linear_takes_the_winner_and_otherwise_what_pick_says(planned):
    keep(0, {OF_LINEAR: {4: name_of("linear", OTHER), 8: LIBRARY}})
    def config(rows, N=6144):
        return linear._kernel("16-bit", torch.bfloat16, rows, N, 4096, 0)[0]
    assert config(4) == config(3) == OTHER
    assert config(8) == config(1) == config(4, N=6145) == FIRST
    assert linear._kernel("16-bit", torch.bfloat16, 4, 6144, 4096, 0, FIRST)[0] == FIRST


def test_linear_w4a16_takes_the_winner(planned):
    name, other = list(linear_w4a16.candidates("float16", 16, 64).items())[2]
    keep(0, {problem("linear_w4a16 g64", torch.float16, 96, 256): {16: name}})
    assert linear_w4a16._kernel(torch.float16, 16, 96, 256, 64, 0)[0] == other
    assert linear_w4a16._kernel(torch.float16, 16, 96, 256, 128, 0)[0] == linear_w4a16.pick("float16", 16, 128)


def test_the_library_is_taken_where_it_has_won_and_the_kernel_beyond_its_usual_rows():
    keep(0, {OF_LINEAR: {4: LIBRARY, 32: name_of("linear", FIRST), 64: "linear_sm90: columns 64"}})
    assert [takes("linear", OF_LINEAR, rows, rows <= 16, 0) for rows in (2, 4, 16, 32, 64, 128)] == [True, False, True, True, False, False]


def test_serves_asks_for_the_weight_as_it_lies():
    x, weight = torch.zeros(20, 4096, dtype=torch.bfloat16), torch.zeros(48, 4096, dtype=torch.bfloat16)
    assert not linear.serves(x, weight, 16)
    forget()
    keep(None, {problem("linear", torch.bfloat16, 48, 4096): {32: name_of("linear", FIRST)}})
    assert linear.serves(x, weight, 16)
    assert not linear.serves(x.float(), weight.float(), 16)  # what it cannot take, no measurement makes it take


def test_the_kernel_for_many_rows_is_taken_where_it_has_won():
    """Also below the rows from which it is taken unmeasured, with the tile and the split that won."""
    offered = hopper.candidates("int8", "float16", 200, 512, 4096, 0)
    name, other = list(offered.items())[1]
    sizes = ("int8", 0, torch.float16, 512, 4096)
    assert hopper._takes(*sizes, 200, 0) == (hopper.FROM_ROWS["int8"] <= 200)
    forget()
    keep(0, {problem("linear_w8a16", torch.float16, 512, 4096): {256: name, 512: LIBRARY}})
    assert hopper._takes(*sizes, 200, 0) and not hopper._takes(*sizes, 400, 0)
    assert hopper._picked("int8", 0, torch.float16, 200, 512, 4096, 4096, 0) == other != next(iter(offered.values()))


@pytest.mark.parametrize("known", [False, True])
def test_int4_is_asked_for_by_its_groups(known):
    x, packed, scales = torch.zeros(20, 256, dtype=torch.bfloat16), torch.zeros(2, 8, 32, 4), torch.zeros(2, 4, 8, 4)
    if known:
        keep(None, {problem("linear_w4a16 g64", torch.bfloat16, 48, 256): {32: LIBRARY}})
    assert [linear_w4a16.serves(x, packed, scales, 48, 64) for _ in range(2)] == [not known] * 2
    assert linear_w4a16.serves(x[:3], packed, scales, 48, 64) and not linear_w4a16.serves(x[:0], packed, scales, 48, 64)
    assert not linear_w4a16.serves(x, packed, scales, 48, 16)


def test_without_a_file_nobody_looks_a_second_time(monkeypatch):
    """The host has some microseconds for a launch."""
    x, weight = torch.zeros(2, 4096, dtype=torch.bfloat16), torch.zeros(48, 4096, dtype=torch.bfloat16)
    assert linear.serves(x, weight, 16)
    monkeypatch.setattr(tuned, "winner", None)
    assert linear.serves(x, weight, 16) and not linear.serves(x, weight, 1) and not linear.serves(x[:0], weight, 16)
