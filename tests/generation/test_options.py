"""Each option of a request, against transformers where it has it, otherwise against the rule written out; and a wrong one is refused."""
from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import ftops
from tests.families.places import IN_FLOAT32
from tests.families.tiny import VOCABULARY, prompt, tiny


def patched(device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return ftops.patch(tiny("llama", device, dtype))


def continued(model: PreTrainedModel, **options: object) -> list[list[int]]:
    """The answers to a batch of three, the first padded on the left."""
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding="left"))
    return ftops.generate(model, ids, mask, **{"max_new_tokens": 16, **options})[:, ids.shape[1]:].tolist()


@torch.no_grad()
def stepwise(model: PreTrainedModel, rule, steps: int = 16) -> list[list[int]]:
    """Greedy decoding without a cache: rule(row, prompt tokens, answer so far, logits[V]) changes the logits of each step."""
    ids, mask = (t.to(model.device) for t in prompt(batch=3, padding="left"))
    start = ids.shape[1]
    for _ in range(steps):
        logits = model(ids, attention_mask=mask, use_cache=False, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1].clone()
        tokens = []
        for row, values in enumerate(logits):
            real = ids[row, :start][mask[row, :start].bool()].tolist()
            tokens.append(int(rule(row, real, ids[row, start:].tolist(), values).argmax()))
        ids = torch.cat((ids, torch.tensor(tokens, device=ids.device)[:, None]), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids[:, start:].tolist()


def penalise(values, tokens, change):
    for token in set(tokens):
        values[token] = change(values[token], tokens.count(token))
    return values


RULES = {
    "nothing": ({}, lambda row, start, said, values: values),
    "repetition": ({"repetition_penalty": 1.3},
                   lambda row, start, said, values: penalise(values, start + said, lambda x, n: x / 1.3 if x > 0 else x * 1.3)),
    "presence": ({"presence_penalty": 3.0}, lambda row, start, said, values: penalise(values, said, lambda x, n: x - 3)),
    "frequency": ({"frequency_penalty": 2.0}, lambda row, start, said, values: penalise(values, said, lambda x, n: x - 2 * n)),
    "rows": ({"presence_penalty": torch.tensor([0.0, 4.0, 1.0]), "frequency_penalty": torch.tensor([1.0, 0.0, 0.0])},
             lambda row, start, said, values: penalise(values, said, lambda x, n: x - (0, 4, 1)[row] - (1, 0, 0)[row] * n)),
    "bias": ({"logit_bias": {5: 4.0, 9: float("-inf")}},
             lambda row, start, said, values: values + torch.tensor([{5: 4.0, 9: float("-inf")}.get(i, 0.0) for i in range(VOCABULARY)])),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    options, rule = RULES[name]
    model = patched()
    assert continued(model, **options) == stepwise(model, rule)


def test_rows_end_at_their_own_length():
    model = patched()
    free = continued(model, pad_token_id=7)
    ended = continued(model, max_new_tokens=torch.tensor([3, 10, 1]), pad_token_id=7)
    assert ended == [free[row][:length] + [7] * (10 - length) for row, length in enumerate((3, 10, 1))]


def test_end_tokens_and_what_forbids_them():
    model = patched()
    free = continued(model)
    eos = [free[0][2], free[1][5]]
    ended = continued(model, eos_token_id=eos, pad_token_id=7)
    for row, tokens in enumerate(ended):
        end = next((i for i, token in enumerate(free[row]) if token in eos), 15)
        assert tokens == (free[row][: end + 1] + [7] * 16)[: len(tokens)]
    later = continued(model, eos_token_id=eos, pad_token_id=7, min_new_tokens=torch.tensor([9, 0, 9]))
    assert not set(eos) & set(later[0][:9]) and not set(eos) & set(later[2][:9])
    assert later[1][: len(ended[1])] == ended[1][: len(later[1])]


def test_stop_sequences_are_of_the_answer():
    """Neither a part of one, nor one that begins in the prompt, ends a row; each row ends by itself."""
    model = patched()
    free = continued(model)
    start = prompt(batch=3, padding="left")[0]
    stop = [free[0][3:6], [int(start[1, -1]), free[1][0]], [free[2][4], free[2][4] + 1]]
    made = ftops.generate(model, *prompt(batch=3, padding="left"), max_new_tokens=16, stop=stop, pad_token_id=7, return_logprobs=True)
    expected = [next((end for end in range(1, 17) for words in stop if free[row][:end][-len(words):] == words and end >= len(words)), 16)
                for row in range(3)]
    assert made.lengths.tolist() == expected
    assert expected[0] == 6
    for row, length in enumerate(expected):
        assert made.sequences[row, 12:].tolist() == free[row][:length] + [7] * (max(expected) - length)


class Letters:
    """A tokenizer whose token i is one letter, or two for multiples of ten."""

    def decode(self, tokens, **_):
        return "".join(chr(0x4E00 + token) + ("+" if token % 10 == 0 else "") for token in tokens)


def test_stop_strings_may_begin_within_a_token():
    model = patched()
    free, text = continued(model, logit_bias={30: 3.0}), Letters()
    place = next(i for i, token in enumerate(free[1][:-1]) if token % 10 == 0)
    stop = "+" + text.decode(free[1][place + 1: place + 2])[0]
    ended = continued(model, logit_bias={30: 3.0}, stop=[stop], tokenizer=text, pad_token_id=7)
    for row in range(3):
        end = next((i for i in range(16) if stop in text.decode(free[row][: i + 1])), 15)
        assert ended[row] == (free[row][: end + 1] + [7] * 16)[: len(ended[row])]


@IN_FLOAT32
def test_a_request_does_not_know_its_batchmates(device, dtype):
    """Options, seed and tokens of a row are its own: alone it gives the tokens that it gave among others."""
    model = patched(device, dtype)
    ids, mask = (t.to(device) for t in prompt(batch=3, padding="left"))
    options = {name: torch.tensor(values, device=device) for name, values in {
        "temperature": [0.7, 1.0, 0.0], "top_k": [20, 120, 5], "top_p": [1.0, 0.8, 1.0], "min_p": [0.0, 0.01, 0.0], "seed": [3, 4, 5],
        "repetition_penalty": [1.0, 1.2, 1.1], "no_repeat_ngram_size": [0, 2, 3], "max_new_tokens": [12, 9, 12]}.items()}
    together = ftops.generate(model, ids, mask, pad_token_id=0, **options)
    for row in range(3):
        alone = ftops.generate(model, ids[row:row + 1], mask[row:row + 1], pad_token_id=0,
                               **{name: values[row:row + 1] for name, values in options.items()})
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()


def test_another_seed_gives_other_tokens():
    model = patched()
    first, again, other = (continued(model, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]
    assert first[1] == continued(model, temperature=1.0, seed=torch.tensor([9, 2, 9]))[1]  # row b draws with seed + b


def test_top_p_decays_and_comes_back():
    """At top_p 0.9, decay 0 and minimum 1e-6 every token after the first is the greedy one, until the reset id has been said."""
    model = patched()
    greedy = continued(model, processors=[])
    options = {"temperature": 1.0, "top_p": 1e-6, "top_p_decay": 0.5, "top_p_min": 1e-6}
    assert continued(model, **options) == greedy
    wide = {"temperature": 2.0, "top_p": 0.99, "top_p_decay": 1e-9, "top_p_min": 1e-9, "seed": 5}
    decayed = continued(model, **wide)
    assert decayed != continued(model, temperature=2.0, top_p=0.99, seed=5)
    reset = continued(model, **wide, top_p_reset_ids=decayed[1][0])
    assert reset[1][0] == decayed[1][0]
    assert reset[1][2:] != decayed[1][2:]


def test_processors_and_criteria_of_the_caller():
    model, seen = patched(), []

    def process(ids, logits):
        seen.append(tuple(ids.shape))
        logits[:, 10:] = float("-inf")
        return logits

    answers = continued(model, processors=[process], criteria=[lambda ids, _: ids[:, -1] == 4], pad_token_id=7, max_new_tokens=8)
    assert all(token < 10 for row in answers for token in row)
    assert seen == [(3, 12 + step) for step in range(len(answers[0]))]
    for row in answers:
        assert 4 not in row or set(row[row.index(4) + 1:]) <= {7}


def test_log_probabilities():
    """Of every token under the model's own distribution, whatever the options; and the logits they come from."""
    model = patched()
    ids, mask = prompt(batch=3, padding="left")
    made = ftops.generate(model, ids, mask, max_new_tokens=torch.tensor([4, 9, 9]), temperature=0.7, top_k=30, pad_token_id=0,
                          return_logprobs=True, return_logits=True)
    longer = torch.cat((mask, torch.ones(3, 9, dtype=torch.long)), 1)
    with torch.no_grad():
        logits = model(made.sequences, attention_mask=longer, use_cache=False, position_ids=(longer.cumsum(-1) - 1).clamp(min=0)).logits
    expected = logits[:, 11:-1].log_softmax(-1).gather(2, made.sequences[:, 12:, None])[..., 0]
    expected[0, 4:] = 0
    torch.testing.assert_close(made.logprobs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.cumulative_logprobs, expected.sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.logits[1:], logits[1:, 11:-1], rtol=1e-4, atol=1e-4)
    assert not made.sequences.is_inference()


WRONG = [
    ({"max_new_tokens": 0}, ["max_new_tokens is 0", "1 or more"]), ({"temperature": -1.0}, ["temperature is -1.0", "0 to inf"]),
    ({"top_p": 0.0}, ["top_p is 0.0", "above 0, up to 1"]), ({"top_k": torch.tensor([1, 0, 1])}, ["top_k is 0", "1 or more"]),
    ({"top_k": torch.tensor([1, 2])}, ["top_k is of shape (2,)", "tensor of 3"]), ({"top_k": 2.5}, ["top_k is 2.5", "integers"]),
    ({"min_p": "high"}, ["min_p is 'high'", "a number"]), ({"repetition_penalty": 0.0}, ["repetition_penalty", "above 0"]),
    ({"bad_words": [[]]}, ["bad_words", "not empty"]), ({"stop": [[5, 999]]}, ["stop is [5, 999]", "0 to 119"]),
    ({"stop": ["end"]}, ["stop has text, 'end'", "tokenizer"]), ({"eos_token_id": 500}, ["eos_token_id is [500]", "0 to 119"]),
    ({"stop": "end"}, ["stop is 'end'", "a list", "texts"]), ({"bad_words": ["end"]}, ["bad_words is end", "token ids"]),
    ({"bad_words": [5]}, ["bad_words is 5", "sequences"]), ({"logit_bias": torch.zeros(7)}, ["logit_bias is (7,)", "(120,), (3, 120)"]),
    ({"min_new_tokens": 3}, ["min_new_tokens", "eos_token_id"]),
    ({"top_p_decay": 0.5}, ["top_p_decay", "top_p, which is None"]), ({"max_new_tokens": 4000}, ["4000", "128 positions"]),
]


@pytest.mark.parametrize(("options", "parts"), WRONG, ids=["-".join(options) + str(i) for i, (options, _) in enumerate(WRONG)])
def test_a_wrong_option_is_refused(options, parts):
    with pytest.raises(ValueError, match=r"^generate: ") as caught:
        continued(patched(), **options)
    for part in parts:
        assert part in str(caught.value)


def test_a_wrong_call_is_refused():
    model, (ids, mask) = patched(), prompt()
    with pytest.raises(TypeError, match=r"generate: num_beans is no option here; ftops.generation.Options has max_new_tokens, "):
        ftops.generate(model, ids, num_beans=4)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be served: it has no ftops block; call ftops.patch"):
        ftops.generate(tiny("llama"), ids)
    with pytest.raises(ValueError, match=r"BertForMaskedLM cannot be served: it is no decoder"):
        ftops.generate(ftops.patch(tiny("bert")), ids)
    with pytest.raises(ValueError, match=r"input_ids is torch.int64 \(12,\); allowed: int64 \[B,S\]"):
        ftops.generate(model, ids[0])
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 11\) on cpu; allowed: \(2, 12\)"):
        ftops.generate(model, ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask is list; allowed: a tensor \(2, 12\), or None"):
        ftops.generate(model, ids, mask.tolist())
    for token in (-1, VOCABULARY):
        with pytest.raises(ValueError, match=f"input_ids has {token} among others; allowed: 0 to {VOCABULARY - 1}, the model's vocabulary"):
            ftops.generate(model, torch.tensor([[1, token, 2]]))
    with pytest.raises(ValueError, match="input_ids is on meta but the model on cpu"):
        ftops.generate(model, ids.to("meta"))
