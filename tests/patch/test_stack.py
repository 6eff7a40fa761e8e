"""An encoder's layers run in one loop, on a GPU as the replay of a CUDA graph: what nobody may notice but by the clock."""
from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

import ftops
from ftops.integrations.transformers import stack
from tests.accuracy import assert_accurate
from tests.engine.recorded import Recorded
from tests.families.tiny import VOCABULARY

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch) -> BertModel:
    """Patched. On a CPU a graph is the list of what was launched, launched again on the same tensors."""
    if request.param == "cpu":
        monkeypatch.setattr(stack, "Graphs", Recorded)
        monkeypatch.setattr(stack, "_capturable", lambda x: not stack.heard(x))
        monkeypatch.setattr(stack, "_stream", lambda x: 0)
    return ftops.patch(small(request.param))


def small(device: str) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
                        max_position_embeddings=64, initializer_range=0.2)
    return BertModel(config, add_pooling_layer=False).eval().to(device)


@pytest.fixture
def served(monkeypatch) -> list[int]:
    """Tokens of each forward in which no layer was called."""
    tokens, original = [], stack.Stack.run

    def run(self, blocks, x, packed):
        tokens.append(x.shape[:2].numel() if packed is None else packed.tokens.numel())
        return original(self, blocks, x, packed)

    monkeypatch.setattr(stack.Stack, "run", run)
    return tokens


def batch(lengths: list[int], longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).long()
    return torch.randint(3, VOCABULARY, mask.shape).to(device), mask.to(device)


@torch.inference_mode()
def found(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=mask).last_hidden_state


def check(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """What Hugging Face finds at every token, and 0 at padding."""
    original = ftops.unpatch(copy.deepcopy(model))
    theirs, exact = (found(m, ids, mask)[mask.bool()] for m in (original, copy.deepcopy(original).double()))
    for _ in range(3):  # as it is, and twice by a graph
        ours = found(model, ids, mask)
        assert_accurate(ours[mask.bool()], exact, theirs)
        assert (ours[~mask.bool()] == 0).all()


def graphs(model: BertModel) -> int:
    return len(model.encoder._ftops._graphs._graphs)


def test_batches_of_all_kinds_share_graphs(model, served):
    """65 to 68 tokens are one size; without padding each shape is its own; and every result stays what it was."""
    torch.manual_seed(0)
    kept = []
    for lengths in ([40, 20, 5], [40, 25, 3], [22, 22, 22]):
        ids, mask = batch(lengths, 40, model.device)
        check(model, ids, mask)
        kept.append(found(model, ids, mask))
    assert graphs(model) == 1 and served == [65] * 4 + [68] * 4 + [66] * 4
    assert len({float(one.double().sum()) for one in kept}) == 3
    check(model, *batch([9, 9], 9, model.device))
    assert graphs(model) == 2
    check(model, *batch([45, 45, 45], 45, model.device))  # more room than any before: the others are captured anew
    assert graphs(model) == 1 and served[12:] == [18] * 3 + [135] * 3
    assert ftops.report(model).fallbacks == 0


def test_little_padding_costs_no_bias(model, served):
    check(model, *batch([20, 19], 20, model.device))
    assert served == [39] * 3


def test_weights_changed_in_place(model):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check(model, ids, mask)
    assert graphs(model) == 1


@pytest.mark.parametrize("change", ["to", "load", "replaced"])
def test_other_weights(model, change):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    other = {name: 1.1 * value for name, value in model.state_dict().items()}
    if change == "to":
        model.double().float()
    elif change == "load":
        model.load_state_dict(other, assign=True)
    else:
        layer = model.encoder.layer[1].output.dense
        layer.weight = torch.nn.Parameter(1.1 * layer.weight.detach())
    check(model, ids, mask)


def test_whoever_listens_to_a_layer_is_called(model, served):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    heard = []
    for module in (model.encoder.layer[1], model.encoder.layer[2].attention):
        handle = module.register_forward_hook(lambda *_: heard.append(1))
        for _ in range(2):
            found(model, ids, mask)
        handle.remove()
    assert len(heard) == 4 and len(served) == 4  # the first hook inside of a layer is found behind a forward, the second before
    check(model, ids, mask)
    assert len(served) == 7


def test_hidden_states(model):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    original = ftops.unpatch(copy.deepcopy(model))
    with torch.inference_mode():
        ours = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(ours.hidden_states) == len(model.encoder.layer) + 1
    with torch.inference_mode():
        theirs = original(ids, attention_mask=mask, output_hidden_states=True)
    for one, other in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        assert torch.allclose(one[mask.bool()], other[mask.bool()], rtol=1e-3, atol=1e-3)


def test_gradients_reach_the_weights(model):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    model(ids, attention_mask=mask).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_a_copy_has_graphs_of_its_own(model):
    ids, mask = batch([9, 4], 9, model.device)
    check(model, ids, mask)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    check(other, ids, mask)
    check(model, ids, mask)


def test_large_forwards_are_not_captured(model, monkeypatch):
    """They keep a GPU busy by themselves, and a graph would keep their memory."""
    monkeypatch.setattr(stack, "BUSY", 1)
    check(model, *batch([9, 4], 9, model.device))
    assert model.encoder._ftops._graphs is None


@pytest.mark.gpu
def test_streams_and_threads():
    """Two streams and two threads at a time: each forward has its own result."""
    from concurrent.futures import ThreadPoolExecutor
    model = ftops.patch(small("cuda"))
    batches = [batch([40, 20 + i, 5], 40, model.device) for i in range(4)]

    wanted = [found(model, *one) for one in batches]
    torch.cuda.synchronize()

    def often(index: int) -> bool:
        side = torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(side):
            return all(torch.allclose(found(model, *batches[index]), wanted[index], rtol=1e-4, atol=1e-4) for _ in range(25))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(4)))
