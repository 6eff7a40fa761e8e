"""Tokens drawn with other probabilities than asked for, or that change with what lies beside them in the batch."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from ftops import ops
from ftops.ops import op_module
from tests.ops import oracle_sample

PLACES = [pytest.param("cpu", torch.float32, id="cpu"), *(
    pytest.param("cuda", dtype, id=f"cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu)
    for dtype in (torch.float32, torch.float16, torch.bfloat16))]
FILTERS = {
    "none": {}, "temperature": {"temperature": 0.6}, "hot": {"temperature": 1.7}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05}, "typical": {"typical_p": 0.7}, "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations from the mean of the chi-square statistic, by Wilson and Hilferty; cells that expect less than 5 are one."""
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_are_the_probabilities(name, device, dtype):
    """Many draws of one row: as many of each token as the definition says, and none that it excludes."""
    draws, words = (20_000 if device == "cpu" else 100_000), 64
    logits = (torch.randn(words) * 1.5).to(dtype)
    expected = oracle_sample.distribution(logits, **FILTERS[name]) * draws
    found = ops.sample(logits.to(device).expand(draws, words), seed=1234, **FILTERS[name]).cpu()
    counts = np.bincount(found.numpy(), minlength=words)
    assert counts[expected == 0].sum() == 0
    assert chi_square(counts, expected) < 4


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_successive_draws_of_one_seed_are_independent(device, dtype):
    """Pairs of draws at offsets n and n + 1, and of neighbouring seeds, fill the square evenly."""
    logits = torch.zeros((20_000, 8), device=device, dtype=dtype)
    first, second = (ops.sample(logits, seed=5, offset=offset).cpu().numpy() for offset in (0, 1))
    for pairs in (first * 8 + second, first[:-1] * 8 + first[1:]):
        assert chi_square(np.bincount(pairs, minlength=64), np.full(64, len(pairs) / 64)) < 4


def test_philox_is_philox():
    """Known answers of Random123, for every word: keys and counters of zeros, of ones, and of the digits of pi."""
    known = {(0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8"}
    for (seed, offset), words in known.items():
        ours = op_module("sample").philox(1, torch.tensor([seed]), torch.tensor([offset]))
        assert [f"{word:08x}" for word in ours[0].tolist()] == words.split()
        assert [f"{int(word):08x}" for word in oracle_sample.philox(1, seed, offset)[0]] == words.split()
    seeds, offsets = torch.tensor([2 ** 40 + 17, -3]), torch.tensor([2 ** 33 + 1, -(2 ** 50)])
    ours = op_module("sample").philox(100, seeds, offsets)
    for row in range(2):
        theirs = oracle_sample.philox(100, seeds[row].item(), offsets[row].item()).reshape(-1)
        assert ours[row].tolist() == theirs.astype(np.int64).tolist()


WARPERS = {
    "top_k": ({"top_k": 9}, [TopKLogitsWarper(9)]), "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]), "typical": ({"typical_p": 0.5}, [TypicalLogitsWarper(0.5)]),
    "all": ({"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.03, "typical_p": 0.9},
            [TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.8), MinPLogitsWarper(0.03), TypicalLogitsWarper(0.9)]),
}


@pytest.mark.parametrize("name", WARPERS)
def test_what_is_kept_is_what_transformers_keeps(name):
    options, warpers = WARPERS[name]
    logits = torch.randn(40, 200) * 3
    theirs = logits
    for warper in warpers:
        theirs = warper(None, theirs)
    rows = {key: torch.full((40,), value) for key, value in options.items()}
    scale = 1 / (rows.pop("temperature", torch.ones(40)) * np.log(2))
    ours = op_module("sample").keep(logits, scale[:, None].float(), *(rows.get(key) for key in ("top_k", "top_p", "min_p", "typical_p")))
    assert torch.equal(ours, theirs > float("-inf"))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_row_does_not_know_its_batchmates(device, dtype):
    logits = (torch.randn(6, 5000, device=device) * 3).to(dtype)
    options = {name: torch.tensor(values, device=device) for name, values in {
        "temperature": [0.0, 1, 0.5, 2, 1, 1], "top_k": [9, 9, 40, 5000, 2000, 1], "top_p": [0.5, 1, 0.9, 0.7, 0.4, 1],
        "seed": [-3, 4, 11, 18, 25, 32]}.items()}
    together = ops.sample(logits, **options)
    for row in range(6):
        alone = ops.sample(logits[row:row + 1], **{name: value[row:row + 1] for name, value in options.items()})
        assert alone.item() == together[row].item()


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.1}],
                         ids=str)
def test_nothing_that_is_hidden_is_drawn(options, device, dtype):
    """-inf and NaN stand for tokens that a penalty or a grammar forbids; rows with one token left, and with none."""
    logits = torch.full((3, 3000), float("-inf"), device=device, dtype=dtype)
    logits[0, 2001] = -70.0
    logits[1, ::2], logits[1, 1777] = float("nan"), 3.0
    tokens = ops.sample(logits, **options).tolist()
    assert tokens == [2001, 1777, 0]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_equal_logits(device, dtype):
    """16-bit logits are often equal: greedy takes the first, filters take all or none of them."""
    logits = torch.zeros((2000, 90), device=device, dtype=dtype)
    logits[:, 30:40], logits[:, 50:60] = 4.0, 2.0
    assert set(ops.sample(logits, temperature=0.0).tolist()) == {30}
    assert set(ops.sample(logits, top_k=5).tolist()) == set(range(30, 40))
    assert set(ops.sample(logits, top_k=11).tolist()) == {*range(30, 40), *range(50, 60)}
    assert set(ops.sample(logits, top_p=0.01).tolist()) == set(range(30, 40))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_kernel_is_the_definition(dtype):
    """Token for token, for every kind of row: few and many candidates, lists that overflow, odd lengths, spreads from flat to one-hot.

    A token may differ where two scores are nearer than the GPU's logarithms are exact: then both were to be drawn equally well.
    """
    module, doubtful, seen = op_module("sample"), 0, 0
    for words in (2, 31, 1000, 1024, 1025, 8192, 32000, 50257, 128256, 151936):
        for spread in (0.01, 1.0, 4.0, 40.0):
            for options in ({}, {"top_k": 50}, {"top_k": 2000}, {"top_k": 9000, "top_p": 0.5}, {"top_p": 0.3}, {"top_p": 0.99},
                            {"min_p": 0.02}, {"top_k": 50, "top_p": 0.9},
                            {"top_k": 1500, "top_p": 0.9, "min_p": 0.001, "temperature": 0.5}):
                logits = (torch.randn(2, words) * spread).to(dtype)
                ours, base = ops.sample(logits.cuda(), seed=seen, **options).cpu(), seen
                for row, (a, b) in enumerate(zip(ours.tolist(), ops.sample(logits, seed=base, **options).tolist(), strict=True)):
                    seen += 1
                    if a != b:
                        drawn = module.philox(-(-words // 4), torch.tensor([base + row]), torch.tensor([0]))
                        noise = module.noise(drawn, torch.float64)[0]
                        score = logits[row].double() / options.get("temperature", 1.0) / np.log(2) + noise[:words]
                        assert abs(score[a] - score[b]) < 1e-4, (words, spread, options, row, a, b)
                        doubtful += 1
    assert doubtful <= 0.01 * seen
