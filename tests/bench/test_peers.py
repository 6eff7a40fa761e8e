"""Peers: one that is not there, cannot run or answers wrong leaves a reason, never a time and never a failure; ours may do none of it."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench.peers import built, installed
from bench.problem import Problem
from bench.record import OURS
from bench.test_ops import check
from ftops.timing import Side

EXACT = torch.linspace(-1, 1, 64)


def checked(**sides):
    sides = [Side(name, run) for name, run in sides.items()]
    problem = Problem("op", "one", lambda device: SimpleNamespace(), {}, lambda _: EXACT, lambda out, _: out, 0.0)
    check(problem, sides, SimpleNamespace())
    return {side.name: side.missing for side in sides}


def test_a_wrong_answer_is_not_timed_and_does_not_excuse_ours():
    def ours_is_wrong_too(_):
        return EXACT * 1.08

    assert checked(**{OURS: lambda _: EXACT, "right": lambda _: EXACT * 1.01, "wrong": lambda _: EXACT * 0.9}) == {
        OURS: None, "right": None, "wrong": "wrong by 0.1 of the largest value"}
    assert "inf" in checked(**{OURS: lambda _: EXACT, "nan": lambda _: EXACT * float("nan")})["nan"]
    with pytest.raises(AssertionError):
        checked(**{OURS: ours_is_wrong_too, "wrong": lambda _: EXACT * 0.9})


def test_what_cannot_be_built_says_why_when_it_is_called():
    def build():
        raise NotImplementedError("no kernel for 7 bits\nand a long explanation")

    assert checked(**{OURS: lambda _: EXACT, "peer": built(build)})["peer"] == "NotImplementedError: no kernel for 7 bits"
    assert built(lambda: len)("four") == 4


def test_nothing_is_imported_to_find_out():
    """A package that is installed without a GPU is no peer: most of them fail on import there."""
    assert not installed("no_such_package")
    assert installed("torch") == torch.cuda.is_available()
