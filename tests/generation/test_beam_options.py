"""ftops.generate with beams: transformers' sequences without its loop, and the diversity that it does not have."""
from __future__ import annotations

import pytest
import torch

import ftops
from tests.families.places import IN_FLOAT32
from tests.families.tiny import prompt, tiny

ENDS = [94, 5, 78]
OPTIONS = {
    "plain": {}, "returned": {"num_return_sequences": 3, "num_beams": 4}, "long": {"length_penalty": 2.0, "early_stopping": "never"},
    "first_k": {"early_stopping": True, "num_return_sequences": 3}, "rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@IN_FLOAT32
@pytest.mark.parametrize("name", OPTIONS)
def test_sequences_are_transformers_own(name, device, dtype):
    ids, mask = (t.to(device) for t in prompt(batch=2, padding="left"))
    options = {"num_beams": 3, "max_new_tokens": 18, "eos_token_id": ENDS, "pad_token_id": 1} | OPTIONS[name]
    model = tiny("llama", device, dtype)
    with torch.no_grad():
        theirs = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(ftops.generate(ftops.patch(model), ids, mask, **options), theirs)
    assert ftops.report(model).fallbacks == 0


@torch.no_grad()
def written_out(model, ids, beams, rate, most, ends, length_penalty=1.0, early_stopping=False):
    """The definition for one prompt, ids [S], without a cache: the sequences [prompt + answer], best first. ends: sequences of tokens."""
    running, done, hopeful = [(0.0, ids.tolist())], [], True
    for made in range(1, most + 1):
        logits = model(torch.tensor([text for _, text in running], device=ids.device), use_cache=False).logits[:, -1].float()
        candidates = []
        for (score, text), row in zip(running, logits.log_softmax(-1), strict=True):
            ranked = sorted(((score + value, token) for token, value in enumerate(row.tolist())), reverse=True)
            candidates += [(value + rate * rank, value, [*text, token]) for rank, (value, token) in enumerate(ranked[: 4 * beams])]
        candidates.sort(key=lambda one: -one[0])
        candidates = candidates[: (1 + len(ends)) * beams]
        over = [made == most or any(made >= len(end) and text[-len(end):] == end for end in ends) for _, _, text in candidates]
        if hopeful and not (early_stopping and len(done) == beams):
            done += [(value / made ** length_penalty, text) for (_, value, text), end in zip(candidates[:beams], over, strict=False) if end]
            done = sorted(done, key=lambda one: -one[0])[:beams]
        running = [(value, text) for (_, value, text), end in zip(candidates, over, strict=True) if not end][:beams]
        if running and len(done) == beams:
            hopeful = hopeful and max(value for value, _ in running) / made ** length_penalty > done[-1][0]
        if not running or not hopeful or (early_stopping and len(done) == beams):
            break
    return [text for _, text in done]


@IN_FLOAT32
@pytest.mark.parametrize("options", [{}, {"length_penalty": 0.0}, {"early_stopping": True}], ids=["plain", "no_penalty", "first_k"])
@pytest.mark.parametrize("rate", [0.0, -0.7, 0.3])
def test_diversity_is_its_definition(rate, options, device, dtype):
    model, ids = ftops.patch(tiny("llama", device, dtype)), prompt(batch=2)[0].to(device)
    made = ftops.generate(model, ids, num_beams=3, num_return_sequences=3, beam_diversity_rate=rate, max_new_tokens=12,
                          eos_token_id=ENDS, pad_token_id=1, **options)
    ends = [[end] for end in ENDS]
    expected = [text + [1] * (made.shape[1] - len(text)) for row in ids for text in written_out(model, row, 3, rate, 12, ends, **options)]
    assert made.tolist() == expected


@IN_FLOAT32
def test_stop_sequences(device, dtype):
    """Of one token, as an end token ends a beam; and of two, which the beams say on the way."""
    model, ids = ftops.patch(tiny("llama", device, dtype)), prompt(batch=2)[0].to(device)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "pad_token_id": 1}
    ended = ftops.generate(model, ids, eos_token_id=ENDS, **options)
    assert torch.equal(ftops.generate(model, ids, stop=[[end] for end in ENDS], **options), ended)
    free = ftops.generate(model, ids, **options)[:, ids.shape[1]:]
    stop = [free[0, 1:3].tolist(), [ENDS[1]]]
    made = ftops.generate(model, ids, stop=stop, length_penalty=0.0, **options)
    expected = [text for row in ids for text in written_out(model, row, 3, 0.0, 12, stop, length_penalty=0.0)]
    assert made.tolist() == [text + [1] * (made.shape[1] - len(text)) for text in expected]
    assert any(text[-2:] == stop[0] for text in expected)


def test_below_zero_beams_differ_sooner():
    model, ids = ftops.patch(tiny("llama")), prompt(batch=2)[0]

    def shared(rate):
        """Tokens of the answers that are alike in all beams, at their beginning."""
        made = ftops.generate(model, ids, num_beams=4, num_return_sequences=4, beam_diversity_rate=rate, max_new_tokens=16)[:, 12:]
        return sum(int((row == row[:1]).all(0).long().cumprod(0).sum()) for row in made.view(2, 4, -1))

    assert shared(-2.0) < shared(0.0)


@IN_FLOAT32
def test_options_a_request(device, dtype):
    """As each request would have them alone."""
    model, (ids, mask) = ftops.patch(tiny("llama", device, dtype)), (t.to(device) for t in prompt(batch=3, padding="left"))
    rows = {"max_new_tokens": [12, 3, 7], "repetition_penalty": [1.0, 1.3, 1.5], "no_repeat_ngram_size": [0, 2, 0]}
    bias = torch.zeros(3, 120, device=device)
    bias[1, 5] = 3.0
    together = ftops.generate(model, ids, mask, num_beams=3, pad_token_id=1, logit_bias=bias,
                              **{name: torch.tensor(values, device=device) for name, values in rows.items()})
    for row in range(3):
        alone = ftops.generate(model, ids[row : row + 1], mask[row : row + 1], num_beams=3, pad_token_id=1, logit_bias=bias[row],
                               **{name: values[row] for name, values in rows.items()})
        assert together[row].tolist() == alone[0].tolist() + [1] * (together.shape[1] - alone.shape[1])


@pytest.mark.parametrize(("options", "message"), [
    ({"num_beams": 0}, "num_beams is 0; allowed: an integer of 2 or more"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3; allowed: 1 to 2, num_beams"),
    ({"num_beams": 2, "beam_diversity_rate": float("nan")}, "beam_diversity_rate is nan; allowed: a finite number"),
    ({"num_beams": 2, "early_stopping": "always"}, "early_stopping is 'always'; allowed: True, False, 'never'"),
    ({"length_penalty": 2.0}, "length_penalty is given and num_beams is 1"),
    ({"num_beams": 2, "temperature": 1.0}, "num_beams is 2, which does not go with temperature"),
    ({"num_beams": 2, "return_logprobs": True}, "num_beams is 2, which does not go with temperature"),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "num_beams is 2, and drafts are of one sequence"),
], ids=lambda one: "-".join(one) if isinstance(one, dict) else "")
def test_wrong_use_is_refused(options, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        ftops.generate(ftops.patch(tiny("llama")), prompt()[0], max_new_tokens=4, **options)
