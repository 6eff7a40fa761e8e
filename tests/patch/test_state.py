"""A patched model's weights are the original's: saved, loaded, moved, copied and trained as if nothing had happened."""
from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

import ftops
from ftops.integrations.transformers.archs import ARCHS
from tests.families.tiny import tiny
from tests.patch.checks import assert_close, assert_same_values, fallen, logits, values


def storages(model: nn.Module) -> int:
    """Bytes behind all parameters and buffers, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def drawn(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Other weights for the model."""
    return {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ARCHS)
def test_state_dict_keeps_keys_order_and_values(family):
    model = tiny(family)
    before, bytes_before = values(model), storages(model)
    objects = [id(parameter) for parameter in model.parameters()]
    ftops.patch(model)
    assert_same_values(model, before)
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert storages(model) == bytes_before


@pytest.mark.parametrize("family", ARCHS)
def test_nothing_is_held_twice(family):
    """Every tensor that the blocks use lies in memory that a parameter uses."""
    model = ftops.patch(tiny(family))
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for module in model.modules():
        if "_ftops" in module.__dict__ and hasattr(module._ftops, "block"):
            for part in filter(None, vars(module._ftops.block.weights).values()):
                assert part.weight.untyped_storage().data_ptr() in owned
                assert part.bias is None or part.bias.untyped_storage().data_ptr() in owned


@pytest.mark.parametrize("family", ARCHS)
def test_save_pretrained(family, tmp_path):
    """The files are those of the unpatched model, and what they hold runs without ftops."""
    model = tiny(family)
    theirs = logits(model)
    model.save_pretrained(tmp_path / "before")
    ftops.patch(model)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()
    again = type(model).from_pretrained(tmp_path / "after", attn_implementation="eager").eval()
    assert torch.equal(logits(again), theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_by_hand(family, tmp_path):
    """safetensors refuses tensors that overlap, and torch.save writes whole storages: neither may notice the fused ones."""
    model = tiny(family)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    sizes = []
    for _ in range(2):
        save_file(state, tmp_path / "state.safetensors")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        sizes.append(buffer.tell())
        ftops.patch(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if name in state}
    assert sizes[1] < 1.01 * sizes[0]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("family", ARCHS)
def test_load_state_dict(family, assign):
    model = tiny(family)
    weights = drawn(model)
    patched = ftops.patch(copy.deepcopy(model))
    logits(patched)
    for target in (model, patched):
        target.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=assign)
        target.tie_weights()
    assert_close(logits(patched), logits(model))
    assert fallen(patched) == {}


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double().float()],
                         ids=["bfloat16", "half", "there_and_back"])
@pytest.mark.parametrize("family", ARCHS)
def test_moved(family, move):
    model = tiny(family)
    patched = move(ftops.patch(copy.deepcopy(model)))
    model = move(model)
    exact = logits(ftops.unpatch(copy.deepcopy(patched)).float())
    theirs, ours = logits(model), logits(patched)
    assert ours.dtype is theirs.dtype
    assert (ours.float() - exact).abs().max() <= 2 * (theirs.float() - exact).abs().max() + 1e-4
    assert_same_values(patched, values(model))
    assert fallen(patched) == {}


@pytest.mark.parametrize("family", ARCHS)
def test_dtype_without_kernels(family):
    """float64 is served by the original layers, with a count, and .float() brings the blocks back."""
    model = tiny(family)
    patched = ftops.patch(copy.deepcopy(model)).double()
    model.double()
    assert torch.allclose(logits(patched), logits(model), atol=1e-12)
    assert sum(fallen(patched).values()) >= model.config.num_hidden_layers
    before = fallen(patched.float())
    logits(patched)
    assert fallen(patched) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ARCHS)
def test_copies(family, duplicate):
    """A copy is patched and stands alone."""
    model = ftops.patch(tiny(family))
    ours = logits(model)
    twin = duplicate(model)
    assert str(ftops.report(twin)) == str(ftops.report(model))
    assert torch.equal(logits(twin), ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), ours)
    assert logits(twin).abs().max() == 0
    ftops.unpatch(twin)
    assert torch.equal(logits(model), ours)
    assert fallen(model) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_tied_embeddings(family):
    model = tiny(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    for step in (ftops.patch, lambda m: m.to(torch.bfloat16), lambda m: m.float(), ftops.unpatch):
        step(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_layers_that_share_parameters():
    """Two layers with one set of weights keep it, fused once."""
    model = tiny("llama")
    first, last = model.model.layers[0], model.model.layers[2]
    for (name, parameter), _ in zip(list(first.named_parameters()), list(last.named_parameters()), strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(last.get_submodule(owner), leaf, parameter)
    theirs = logits(model)
    assert_close(logits(ftops.patch(model)), theirs)
    assert storages(model) == storages(copy.deepcopy(model))
    assert first.mlp.up_proj.weight is last.mlp.up_proj.weight
    assert fallen(model) == {}
    assert torch.equal(logits(ftops.unpatch(model)), theirs)


@pytest.mark.parametrize("family", ARCHS)
def test_trained_after_patch(family):
    """Three steps of training give the losses and weights of an unpatched model, and inference then uses the new weights."""
    losses, ends = [], []
    for patched in (False, True):
        model = tiny(family)
        if patched:
            ftops.patch(model)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ids = torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            torch.manual_seed(0)  # dropout
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        ends.append(model.eval())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    theirs, ours = ends
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    count = sum(fallen(ours).values())
    assert count >= 3 * ours.config.num_hidden_layers
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-3)
    assert sum(fallen(ours).values()) == count


@pytest.mark.parametrize("family", ARCHS)
def test_memory_put_under_a_parameter(family):
    """As torch.nn.utils.vector_to_parameters and averaged weights do: the block's memory is no longer the parameter's."""
    model = ftops.patch(tiny(family))
    other = tiny(family)
    other.load_state_dict(drawn(other))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    assert_close(logits(model), logits(other))
    layers = model.config.num_hidden_layers
    assert fallen(model) == {"parameters were given other memory; call ftops.patch(model) again": layers}
    ftops.patch(model)
    assert_close(logits(model), logits(other))
    assert sum(fallen(model).values()) == layers


def test_patched_inside_inference_mode():
    """The parameters stay ordinary ones, which can be trained after unpatch."""
    model = tiny("llama")
    theirs = logits(model)
    with torch.inference_mode():
        ftops.patch(model)
    assert_close(logits(model), theirs)
    ftops.unpatch(model)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
