"""AWQ and GPTQ checkpoints: what int4 stands for is what a plain unpacking of the checkpoint gives, bit for bit."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import ftops
from ftops.quant import int4
from ftops.quant.foreign import FOREIGN
from tests.families.tiny import tiny
from tests.patch.checks import assert_close, logits

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def drawn(N, K, groups, sym=False):
    """q[N,K] and zeros[groups,N] of four bits, scales[groups,N]."""
    zeros = torch.full((groups, N), 8) if sym else torch.randint(1, 16, (groups, N))
    return torch.randint(16, (N, K)), zeros, ((torch.rand(groups, N) + 0.5) / 100).half()


def words(values, dim, order=range(8)):
    """Eight values of four bits a word along `dim`, value order[i] of them at bit 4 i, as the packers of both write them."""
    values = values.movedim(dim, -1).unflatten(-1, (-1, 8)).long()
    packed = sum(values[..., place] << (4 * bit) for bit, place in enumerate(order))
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).to(torch.int32).movedim(-1, dim).contiguous()


def gptq(q, zeros, scales, v2=False, groups=None):
    K = q.shape[1]
    groups = torch.arange(K) // (K // len(scales)) if groups is None else groups
    return {"qweight": words(q.t(), 0), "qzeros": words(zeros if v2 else (zeros - 1) & 15, 1), "scales": scales, "g_idx": groups.int()}


def awq(q, zeros, scales):
    return {"qweight": words(q.t(), 1, AWQ), "qzeros": words(zeros, 1, AWQ), "scales": scales}


def formula(q, zeros, scales, size):
    spread = [part.t().repeat_interleave(size, 1)[:, : q.shape[1]].float() for part in (zeros, scales)]
    return (q - spread[0]) * spread[1]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("method", ["awq", "gptq", "gptq_v2"])
def test_a_weight_bit_for_bit(method, size, sym):
    K = 384
    width = K if size == -1 else size
    given = drawn(72, K, K // width, sym)
    tensors = awq(*given) if method == "awq" else gptq(*given, v2=method == "gptq_v2")
    options = {"bits": 4, "group_size": size, "sym": sym, "checkpoint_format": method, "version": "gemm"}
    qw = FOREIGN[method[:4].rstrip("_")](tensors, options)
    assert torch.equal(int4.dequantize(qw), formula(*given, width).half())
    assert (qw.tensors["scales"].dim() == 4) == sym
    x = torch.randn(3, K).half()
    assert (int4.linear(x, qw).float() - x.float() @ formula(*given, width).T).abs().max() < 0.02


def test_a_word_of_each():
    """The layouts, written out by hand."""
    q = torch.zeros(8, 8, dtype=torch.long)
    q[1, 3] = 9
    zeros, scales = torch.full((1, 8), 8), torch.ones(1, 8).half()
    assert gptq(q, zeros, scales)["qweight"].tolist() == [[0, 9 << 12, 0, 0, 0, 0, 0, 0]]  # column 1, bit 4 * 3
    assert awq(q, zeros, scales)["qweight"].tolist() == [[0], [0], [0], [9 << 16], [0], [0], [0], [0]]  # row 3; column 1 is the fifth
    assert gptq(q, zeros, scales)["qzeros"].tolist() == [[0x77777777]]


def checkpoint(folder, method, options):
    """A llama whose linear layers are drawn at random in the method's layout, and the model that it stands for, in float32."""
    model = tiny("llama", dtype=torch.float16)
    state, theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, {}
    model.float()
    for path, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            N, K = module.weight.shape
            given = drawn(N, K, K // 64)
            tensors = awq(*given) if method == "awq" else gptq(*given)
            module.weight.data = formula(*given, 64)
            del state[f"{path}.weight"]
            theirs |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"], "quantization_config": options}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in (state | theirs).items()}, folder / "model.safetensors", {"format": "pt"})
    return model


OPTIONS = {"awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
           "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_checkpoint(method, tmp_path):
    """Loaded, patched, and saved as ftops' own."""
    plain = checkpoint(tmp_path, method, OPTIONS[method])
    model = ftops.load(tmp_path, device="cpu")
    assert {module.qw.name for module in model.modules() if hasattr(module, "qw")} == {"int4 g64"}
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight.half())
    theirs, ours = logits(plain), logits(ftops.patch(model)).float()
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    ftops.save(model, tmp_path / "own")
    assert torch.equal(logits(ftops.patch(ftops.load(tmp_path / "own", device="cpu"))).float(), ours)
    assert_close(logits(model.to(torch.float32)), theirs)


def bits(options, tensors):
    options["bits"] = 3


def size(options, tensors):
    options["group_size"] = 1024


def order(options, tensors):
    tensors["g_idx"] = tensors["g_idx"].flip(0)


def missing(options, tensors):
    del tensors["qzeros"]


def shape(options, tensors):
    tensors["scales"] = tensors["scales"][:2]


def dtype(options, tensors):
    tensors["qweight"] = tensors["qweight"].long()


WRONG = {bits: "bits is 3; allowed: 4", size: "group_size is 1024", order: r"g_idx is in another order .*desc_act",
         missing: "qzeros is missing",
         shape: r"since qweight is that of a weight 64 x 384 in groups of 64", dtype: r"qweight is torch.int64"}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_int4_cannot_be_is_refused(wrong):
    options, tensors = dict(OPTIONS["gptq"]), gptq(*drawn(64, 384, 6))
    wrong(options, tensors)
    with pytest.raises(ValueError, match=WRONG[wrong]):
        FOREIGN["gptq"](tensors, options)


def test_another_version_of_awq_is_refused(tmp_path):
    checkpoint(tmp_path, "awq", OPTIONS["awq"] | {"version": "gemv"})
    with pytest.raises(ValueError, match=r"load: model\.layers\.0\.[a-z_.]*: awq: version is 'gemv'; allowed: 'gemm'"):
        ftops.load(tmp_path, device="cpu")
