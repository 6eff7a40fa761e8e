"""Everything else that a forward or generate takes: positions, packing, heads, caches of other kinds, ways to decode."""
from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForTokenClassification, PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import VOCABULARY, causal, prompt, tiny
from tests.patch.checks import assert_close, fallen, logits

DECODERS = [family for family in ARCHS if causal(family)]
PACKABLE = [family for family in DECODERS if ARCHS[family].uses_registry]


def both(family: str, run, attention: str = "sdpa") -> tuple[torch.Tensor, torch.Tensor, PreTrainedModel]:
    """run(model) unpatched and patched, and the patched model."""
    model = tiny(family, attention=attention if ARCHS[family].uses_registry else "eager")
    with torch.inference_mode():
        theirs = run(model)
        ours = run(ftops.patch(model))
    return theirs, ours, model


@pytest.mark.parametrize("family", ARCHS)
def test_positions_of_the_callers_own(family):
    ids = prompt()[0]
    positions = torch.arange(ids.shape[1]).flip(0).unsqueeze(0).expand(2, -1) + torch.tensor([[3], [40]])
    theirs, ours, model = both(family, lambda m: m(ids, position_ids=positions).logits)
    assert_close(ours, theirs)
    assert fallen(model) == {}


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_sequences(family):
    """Positions that start again are another sequence in the same row: it must not see the one before."""
    ids = prompt(batch=1, length=18)[0]
    positions = torch.cat([torch.arange(n) for n in (7, 8, 3)]).unsqueeze(0)
    theirs, ours, model = both(family, lambda m: m(ids, position_ids=positions, use_cache=False).logits)
    assert_close(ours, theirs)
    alone = logits(model, ids[:, 7:15], use_cache=False)
    assert torch.allclose(ours[:, 7:15], alone, atol=1e-4)
    assert fallen(model) == {}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@pytest.mark.parametrize("family", ARCHS)
def test_masks_of_any_dtype(family, dtype):
    ids, mask = prompt(padding="left")
    theirs, ours, _ = both(family, lambda m: m(ids, attention_mask=mask.to(dtype)).logits[mask.bool()])
    assert_close(ours, theirs)


@pytest.mark.parametrize("family", ARCHS)
def test_a_row_of_padding_alone(family):
    """What the other rows get does not change, and nothing is NaN."""
    ids, mask = prompt(batch=3)
    mask[1] = 0
    _, ours, model = both(family, lambda m: m(ids, attention_mask=mask).logits)
    assert ours.isfinite().all()
    assert torch.allclose(ours[0::2], logits(model, ids[0::2]), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 2), (3, 97)])
@pytest.mark.parametrize("family", ARCHS)
def test_sizes(family, shape):
    ids = prompt(*shape)[0]
    theirs, ours, _ = both(family, lambda m: m(ids).logits)
    assert_close(ours, theirs)


HEADS = [(family, name) for family in ARCHS
         for name in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")]


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_heads(family, head):
    """Any head over the same layers: classification, tagging, questions, none."""
    config = tiny(family).config
    config.num_labels = 2 if head == "ForQuestionAnswering" else 5
    kind = getattr(transformers, type(tiny(family)).__name__.replace("ForCausalLM", head).replace("LMHeadModel", head)
                   .replace("ForMaskedLM", head), None)
    if kind is None:
        pytest.skip(f"transformers has no {family} {head}")
    torch.manual_seed(0)
    model = kind(config).eval()
    ids, mask = prompt(padding="right")
    with torch.inference_mode():
        theirs = model(ids, attention_mask=mask)
        ours = ftops.patch(model)(ids, attention_mask=mask)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            chosen = mask.bool() if value.shape[:2] == mask.shape else ...
            assert_close(ours[name][chosen], value[chosen])
    report = ftops.report(model)
    assert report.family == family and report.fallbacks == 0
    assert sum(row.kind == ARCHS[family].layer for row in report.swapped) == config.num_hidden_layers


def test_a_model_inside_of_a_module_of_ones_own():
    """A retriever of two encoders: both are fused, and nothing else is touched."""
    class Retriever(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.question, self.passage = tiny("bert"), tiny("gpt2")
            self.scale = torch.nn.Linear(1, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.scale((self.question(ids).logits * self.passage(ids).logits).mean((1, 2)).unsqueeze(-1))

    model = Retriever().eval()
    ids = prompt()[0]
    with torch.inference_mode():
        theirs = model(ids)
        ours = ftops.patch(model)(ids)
        assert_close(ours, theirs)
        assert {"BertLayer", "GPT2Block"} <= {row.kind for row in ftops.report(model).swapped}
        assert torch.equal(ftops.unpatch(model)(ids), theirs)


def generate(model: PreTrainedModel, **options) -> list[list[int]]:
    ids, mask = prompt(batch=1)
    torch.manual_seed(3)
    with torch.inference_mode():
        return model.generate(ids, attention_mask=mask, max_new_tokens=16, disable_compile=True, **options).tolist()


WAYS = {
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "min_p": {"do_sample": True, "min_p": 0.05, "temperature": 1.5},
    "scores": {"do_sample": False, "output_scores": True},
    "two at once": {"do_sample": True, "num_return_sequences": 3},
    "early exit": {"do_sample": False, "stop_strings": None, "max_time": 60.0},
}


@pytest.mark.parametrize(("family", "way"), [
    (family, way) for one, family in enumerate(DECODERS) for other, way in enumerate(WAYS) if (one + other) % 3 == 0])
def test_ways_to_generate(family, way):
    model = tiny(family)
    theirs = generate(model, **WAYS[way])
    assert generate(ftops.patch(model), **WAYS[way]) == theirs
    assert fallen(model) == {}


@pytest.mark.parametrize("patched", ["model", "assistant", "both"])
def test_assisted_generation(patched):
    model, assistant = tiny("llama"), tiny("qwen3")
    theirs = generate(model, do_sample=False)
    for one, name in ((model, "model"), (assistant, "assistant")):
        if patched in (name, "both"):
            ftops.patch(one)
    assert generate(model, do_sample=False, assistant_model=assistant) == theirs


@pytest.mark.skipif(not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no 8-bit cache of its own")
@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_that_quantises(family):
    """Served or not, keys and values go through the cache that the user chose."""
    from transformers.cache_utils import Cache, Fp8QuantizedLayer
    ids = prompt(length=20)[0]

    def run(model: PreTrainedModel) -> torch.Tensor:
        cache = Cache(layers=[Fp8QuantizedLayer() for _ in range(model.config.num_hidden_layers)])
        model(ids[:, :12], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12, 20)], 1)

    theirs, ours, model = both(family, run)
    plain = logits(model, ids)[:, 12:]
    assert (ours - theirs).abs().max() <= 0.5 * (theirs - plain).abs().max()


def test_token_classification_pipeline(tmp_path):
    """Saved patched, loaded by its name, tagged: what a user of pipelines does."""
    config = tiny("bert").config
    config.num_labels = 3
    model = transformers.BertForTokenClassification(config).eval()
    ids = torch.randint(3, VOCABULARY, (1, 11))
    with torch.inference_mode():
        theirs = model(ids).logits
        ftops.patch(model).save_pretrained(tmp_path)
        again = ftops.patch(AutoModelForTokenClassification.from_pretrained(tmp_path))
        assert_close(again(ids).logits, theirs)
