"""Reading a generation while it runs: every token once and in its turn, text in whole characters, and an end at any time."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.generation.text import Text
from ftops.integrations.demo.load import load_causal_lm
from ftops.integrations.transformers import decoder
from tests.families.places import IN_FLOAT32
from tests.families.tiny import prompt, tiny


def start(model, **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding="left"))
    return ftops.stream(model, ids, mask, **{"max_new_tokens": 12, "pad_token_id": 7, **options})


def whole(model, **options):
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding="left"))
    return ftops.generate(model, ids, mask, **{"max_new_tokens": 12, "pad_token_id": 7, **options})


@IN_FLOAT32
def test_steps_are_the_tokens_of_generate(device, dtype):
    model = ftops.patch(tiny("llama", device, dtype))
    options = {"max_new_tokens": torch.tensor([12, 3, 7]), "temperature": 0.8}
    expected = whole(model, **options)
    running = start(model, **options)
    steps = list(running)
    assert torch.stack(steps, 1).tolist() == expected[:, 12:].tolist()
    assert torch.equal(running.result().sequences, expected)
    assert running.result().lengths.tolist() == [12, 3, 7]
    assert running.ended.all()


@IN_FLOAT32
def test_cancelled_rows_end_and_the_others_do_not_notice(device, dtype):
    model = ftops.patch(tiny("llama", device, dtype))
    expected = whole(model)[:, 12:].tolist()
    running = start(model)
    for count, _ in enumerate(running, 1):
        if count == 4:
            running.cancel([0, 2])
    made = running.result()
    assert made.lengths.tolist() == [4, 12, 4]
    assert made.sequences[:, 12:].tolist() == [expected[0][:4] + [7] * 8, expected[1], expected[2][:4] + [7] * 8]


@IN_FLOAT32
@pytest.mark.parametrize("how", ["cancel", "leave"])
def test_ended_early(how, device, dtype):
    """What has been read stays; the cache is free for the next call, which is none the worse for it."""
    model = ftops.patch(tiny("llama", device, dtype))
    expected = whole(model)
    running, read = start(model), []
    for tokens in running:
        read.append(tokens.tolist())
        if len(read) == 5:
            if how == "leave":
                break
            running.cancel()
    if how == "leave":
        running.cancel()
    made = running.result()
    assert made.lengths.tolist() == [5, 5, 5]
    assert torch.equal(made.sequences, expected[:, :17])
    assert list(running) == []
    assert torch.equal(whole(model), expected)
    assert len(decoder._SESSIONS[model]) == 1


@IN_FLOAT32
def test_two_at_once(device, dtype):
    """Streams that are read in turns have a cache each."""
    model = ftops.patch(tiny("llama", device, dtype))
    expected = [whole(model, seed=seed, temperature=1.0) for seed in (1, 2)]
    streams = [start(model, seed=seed, temperature=1.0) for seed in (1, 2)]
    for _ in zip(*streams, strict=True):
        pass
    assert all(torch.equal(one.result().sequences, other) for one, other in zip(streams, expected, strict=True))


def test_nothing_before_the_first_step():
    running = start(ftops.patch(tiny("llama")))
    assert running.ended is None
    with pytest.raises(RuntimeError, match="result before the first step; iterate first"):
        running.result()


def test_a_wrong_option_is_refused_at_once():
    with pytest.raises(ValueError, match="generate: top_p is 2"):
        start(ftops.patch(tiny("llama")), top_p=2.0)


def test_text_of_a_real_tokenizer():
    """Pieces together are the whole text, and spaces between words are not lost."""
    model, tokenizer = load_causal_lm()
    ids = tokenizer("import os\n\ndef main(", return_tensors="pt").input_ids
    running = ftops.stream(ftops.patch(model), ids, max_new_tokens=40)
    pieces = [piece for piece, in running.text(tokenizer)]
    answer = running.result().sequences[0, ids.shape[1]:]
    assert "".join(pieces) == tokenizer.decode(answer, skip_special_tokens=True)
    assert sum(map(bool, pieces)) > 10


class Bytes:
    """A tokenizer of bytes, in which most characters take several tokens."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


def test_characters_come_whole():
    written = "naïve – 漢字 🙂"
    text = Text(Bytes())
    pieces = [text.add(token) for token in written.encode()]
    assert "".join(pieces) == written
    assert not any("\ufffd" in piece for piece in pieces)
    text = Text(Bytes())
    assert "".join(text.add(token) for token in "é🙂".encode()[:-1]) == "é"
    assert text.rest() == "\ufffd"


def test_strings_to_stop_at():
    text = Text(Bytes(), ["\n\n", "漢"])
    assert [text.add(token) is not None and text.stops() for token in b"a\nb\n\nc"] == [False, False, False, False, True, False]
    assert [text.add(token) is not None and text.stops() for token in "漢".encode()] == [False, False, True]
