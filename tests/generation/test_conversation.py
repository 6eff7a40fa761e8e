"""A talk whose cache is kept says what a full recompute of all that was said would say, whoever ended when."""
from __future__ import annotations

import pytest
import torch

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.places import IN_FLOAT32
from tests.families.tiny import causal, prompt, tiny

DECODERS = [family for family in ARCHS if causal(family)]


def turns(device, *lengths, batch=3, padding=None):
    """New tokens of each turn and their mask; padding as of `prompt`."""
    return [tuple(t.to(device) for t in prompt(batch=batch, length=length, padding=padding, seed=length)) for length in lengths]


def follows(model, chat, ids, mask, **options):
    """Takes a turn, and compares it with a generation from everything."""
    said, real = torch.cat((chat.ids, ids), 1), torch.cat((chat.mask, mask), 1)
    whole = ftops.generate(model, said, real, return_logits=True, **options)
    made = chat.generate(ids, mask, return_logits=True, **options)
    assert torch.equal(made.sequences, whole.sequences[:, said.shape[1] - ids.shape[1]:])
    assert torch.equal(made.lengths, whole.lengths)
    torch.testing.assert_close(made.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(chat.ids, whole.sequences)
    return made


@pytest.fixture
def read(monkeypatch):
    """Of each prompt that a model reads, the tokens."""
    counts: list[int] = []

    def watch(model):
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: counts.append(args[0].shape[1]) if args[0].shape[1] > 1 else None)
        return counts
    return watch


@IN_FLOAT32
@pytest.mark.parametrize("family", DECODERS)
def test_family(family, device, dtype, read):
    """Past every window, with turns longer and shorter than what a step may read; nothing is read twice but the last token said."""
    model = ftops.patch(tiny(family, device, dtype))
    chat = ftops.conversation(model, 3, capacity=100)
    for ids, mask in turns(device, 12, 3, 20):
        follows(model, chat, ids, mask, max_new_tokens=6)
    assert ftops.report(model).fallbacks == 0
    counts, fresh = read(model), ftops.conversation(model, 3, capacity=100)
    for ids, mask in turns(device, 12, 3, 20):
        fresh.generate(ids, mask, max_new_tokens=6)
    assert counts == [12, 4, 21]
    assert torch.equal(fresh.ids, chat.ids)


@IN_FLOAT32
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_rows_that_end_and_turns_of_different_lengths(family, device, dtype):
    model = ftops.patch(tiny(family, device, dtype))
    chat, taken = ftops.conversation(model, 3, capacity=128), turns(device, 12, 14, 9, padding="left") + turns(device, 10, padding="right")
    free = ftops.generate(model, *taken[0], max_new_tokens=12)[:, 12:]
    ends = [int(free[0, 2]), int(free[1, 5])]
    lengths = [follows(model, chat, *turn, max_new_tokens=12, eos_token_id=ends, pad_token_id=1).lengths for turn in taken]
    assert len(set(lengths[0].tolist())) > 1
    assert torch.equal(chat.mask.sum(1).cpu(), sum(mask.sum(1).cpu() for _, mask in taken) + sum(lengths))


@IN_FLOAT32
def test_options_of_a_turn(device, dtype):
    """Penalties see what was said before, stop words do not; a seed draws as it would in a prompt."""
    model = ftops.patch(tiny("llama", device, dtype))
    chat = ftops.conversation(model, 3, capacity=128)
    first, second, third = turns(device, 12, 5, 8)
    said = follows(model, chat, *first, max_new_tokens=6).sequences
    follows(model, chat, *second, max_new_tokens=6, repetition_penalty=1.3, no_repeat_ngram_size=2)
    follows(model, chat, *third, max_new_tokens=6, temperature=0.9, top_k=20, seed=3)
    follows(model, chat, first[0][:, :0], first[1][:, :0], max_new_tokens=6, stop=[[int(said[0, -1])]], pad_token_id=1)


@IN_FLOAT32
def test_streams_and_rewinding(device, dtype):
    """What was read has been said, also where a turn was cut short; what is forgotten might not have been."""
    model = ftops.patch(tiny("llama", device, dtype))
    chat = ftops.conversation(model, 3, capacity=128)
    first, second, third = turns(device, 12, 5, 8)
    running = chat.stream(*first, max_new_tokens=20)
    with pytest.raises(RuntimeError, match="still being read; read it to its end, or cancel it"):
        for count, _ in enumerate(running, 1):
            if count == 4:
                chat.generate(*second, max_new_tokens=3)
    running.cancel()
    assert chat.ids.shape[1] == 12 + 4
    late = chat.stream(*second, max_new_tokens=3)
    follows(model, chat, *second, max_new_tokens=6)
    with pytest.raises(RuntimeError, match="something else was said since"):
        next(iter(late))
    for length in (17, 12, 5):
        chat.rewind(length)
        follows(model, chat, *third, max_new_tokens=6)


@IN_FLOAT32
def test_hidden_states_are_of_the_turn(device, dtype):
    model = ftops.patch(tiny("llama", device, dtype))
    chat = ftops.conversation(model, 3, capacity=64)
    first, second = turns(device, 12, 5, padding=None)
    chat.generate(*first, max_new_tokens=4)
    said = torch.cat((chat.ids, second[0]), 1)
    whole = ftops.generate(model, said, max_new_tokens=2, return_hidden_states=True).context_hidden_states
    made = chat.generate(*second, max_new_tokens=2, return_hidden_states=True)
    torch.testing.assert_close(made.context_hidden_states, whole[:, -5:], rtol=1e-4, atol=1e-4)


def test_eight_bits():
    """A turn reads what is kept in 8 bits: near the exact logits, with the scales of the first turn."""
    model, exact = ftops.patch(tiny("llama"), kv_cache="int8"), ftops.patch(tiny("llama"))
    chat = ftops.conversation(model, 3, capacity=64)
    first, second = turns("cpu", 12, 9)
    chat.generate(*first, max_new_tokens=4)
    said = torch.cat((chat.ids, second[0]), 1)
    whole = ftops.generate(exact, said, max_new_tokens=1, return_logits=True).logits
    made = chat.generate(*second, max_new_tokens=1, return_logits=True).logits
    assert 0 < (made - whole).norm() < 0.1 * whole.norm()


@pytest.mark.gpu
def test_a_turn_uses_the_graphs_of_the_last_one():
    model = ftops.patch(tiny("llama", "cuda"))
    chat = ftops.conversation(model, 3, capacity=100)
    for ids, mask in turns("cuda", 12, 3, 20):
        chat.generate(ids, mask, max_new_tokens=6)
    assert len(chat._session._captured) == 1


def test_wrong_use_is_refused():
    model = ftops.patch(tiny("llama"))
    with pytest.raises(ValueError, match="conversation: capacity is 500; allowed: 2 to 128, the positions of this model"):
        ftops.conversation(model, capacity=500)
    with pytest.raises(ValueError, match="conversation: batch is 0; allowed: 1 or more"):
        ftops.conversation(model, 0, 100)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be served: it has no ftops block"):
        ftops.conversation(tiny("llama"), capacity=100)
    assert ftops.conversation(model).capacity == 128
    chat, (ids, mask) = ftops.conversation(model, 2, 40), prompt(batch=2)
    with pytest.raises(ValueError, match=r"input_ids is \(3, 12\); allowed: \[2,S\], the batch size that it was made for"):
        chat.generate(prompt(batch=3)[0])
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 11\) on cpu; allowed: \(2, 12\) on cpu"):
        chat.generate(ids, mask[:, 1:])
    with pytest.raises(ValueError, match="at least one token a row"):
        chat.generate(ids[:, :0])
    with pytest.raises(ValueError, match="generate: prompt_lookup_num_tokens is given"):
        chat.generate(ids, prompt_lookup_num_tokens=4)
    chat.generate(ids, mask, max_new_tokens=8)
    with pytest.raises(ValueError, match="20 tokens said, 12 new ones and max_new_tokens 9 exceed its capacity of 40; ask for fewer"):
        chat.generate(ids, mask, max_new_tokens=9)
    with pytest.raises(ValueError, match="conversation: length is 21; allowed: 0 to 20"):
        chat.rewind(21)
    assert chat.ids.shape == (2, 20)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the model has been changed since it began"):
        chat.generate(ids, max_new_tokens=2)
    ftops.unpatch(model)
    with pytest.raises(ValueError, match="cannot be served: it has no ftops block"):
        chat.generate(ids, max_new_tokens=2)
