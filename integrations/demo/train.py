"""Train the language model that ftops ships as its embedded default.

    python -m ftops.integrations.demo.train --out integrations/demo/model --minutes 5

A Llama-architecture causal model of 4.0 M parameters and its byte-level BPE tokenizer learn the .py text of the standard
library of the Python that runs this file. The objective is next-token cross entropy on windows of CONTEXT tokens at random
offsets of one long token stream, files being separated by <|endoftext|>. Every file the folder gets is what
AutoModelForCausalLM and AutoTokenizer read; training_log.json and training_log.md say how the weights came to be.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ftops.integrations.demo.corpus import (
    CONTEXT,
    END,
    PAD,
    SKIPPED_FOLDERS,
    read_corpus,
    token_stream,
    train_tokenizer,
    validation_windows,
)

SIZE_LIMIT = 8 * 1024 * 1024  # bytes of safetensors a clone of the repository is willing to carry
CURVE_WINDOWS = 64  # held-out windows behind a row of the curve, evenly spread; the saved files are judged on all of them
# No prompt ends in white space: a line's end and the next line's indentation are one token.
PROMPTS = (
    "def read_lines(path):\n    with open(path) as f:",
    "class TestQueue(unittest.TestCase):\n\n    def setUp(self):",
    "import os\nimport sys\n\ndef main():",
)

# 4.0 M parameters, a quarter of them the (tied) embedding. Head dim 64, the least that attention kernels are tuned for, and two
# query heads to a key head, so that the smallest real model still exercises GQA. At one size five layers of MLP 512 were
# preferred to four of 704: in small models depth is worth more than width (MobileLLM, arXiv:2402.14905, section 3.2).
SHAPE = dict(vocab_size=4096, hidden_size=256, num_hidden_layers=5, intermediate_size=512,
             num_attention_heads=4, num_key_value_heads=2, head_dim=64)


@dataclass(frozen=True)
class Hyperparameters:
    """What decides the result besides SHAPE and the text. Every epoch is some 10 M tokens, or 4 M where Python lacks its tests."""

    batch_tokens: int = 65536  # the smaller end of what fills the GPU: a model this small wants more steps, not larger ones
    peak_lr: float = 2e-3
    final_lr_share: float = 0.02
    warmup_share: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    dropout: float = 0.1  # on what attention and MLP add to the residual; repeated data without it is learnt by heart
    max_epochs: float = 60.0  # past about 40 repetitions data adds next to nothing (Muennighoff et al., arXiv:2305.16264)
    seed: int = 0


def build_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    header = 16384
    if 2 * parameters + header > SIZE_LIMIT:
        raise ValueError(f"build_model: {parameters} bfloat16 parameters exceed the limit of {SIZE_LIMIT} bytes; make SHAPE smaller")
    return LlamaForCausalLM(config).to(device)


@contextlib.contextmanager
def residual_dropout(model: LlamaForCausalLM, p: float) -> Iterator[None]:
    """Drop out what each layer adds to its residual stream while training; Llama itself has no such option."""

    def drop(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, p, training=module.training)

    branches = [m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)] if p else []
    hooks = [branch.register_forward_hook(drop) for branch in branches]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def loss_function(model: LlamaForCausalLM) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return windows[B, CONTEXT + 1] -> mean next-token cross entropy in nats, a float32 scalar."""

    def loss_of(windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return loss_of


def compile_or_not(loss_of: Callable, windows: torch.Tensor) -> tuple[Callable, str]:
    """Return the compiled loss and how it runs, or the eager one and why: compiling needs Triton and a C compiler."""
    compiled = torch.compile(loss_of)
    try:
        compiled(windows).backward()
    except Exception as error:  # whatever a broken tool chain raises: eager gives the same result later
        print(f"torch.compile is not available, training runs eagerly: {type(error).__name__}: {str(error).splitlines()[0]}")
        torch._dynamo.reset()
        return loss_of, f"eager ({type(error).__name__} from torch.compile)"
    return compiled, "torch.compile"


def learning_rate(progress: float, hyper: Hyperparameters) -> float:
    """Return the rate at a share of the budget: linear warm-up, then half a cosine down to final_lr_share of the peak."""
    if progress < hyper.warmup_share:
        return hyper.peak_lr * max(progress, 1e-3) / hyper.warmup_share
    angle = math.pi * min(1.0, (progress - hyper.warmup_share) / (1 - hyper.warmup_share))
    return hyper.peak_lr * (hyper.final_lr_share + (1 - hyper.final_lr_share) * 0.5 * (1 + math.cos(angle)))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, windows: torch.Tensor, batch: int) -> float:
    """Return the mean loss in nats a token over windows[n, CONTEXT + 1]."""
    model.eval()
    loss_of = loss_function(model)
    total = sum(loss_of(part).item() * len(part) for part in windows.split(batch))
    model.train()
    return total / len(windows)


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, hyper: Hyperparameters, deadline: float, steps: int | None
) -> tuple[list[dict], dict]:
    """Train in place up to `deadline` (time.perf_counter's seconds), `steps` or max_epochs, and leave the weights that validated best.

    Returns the curve, a row each 2% of the budget, and a summary. Time and tokens both grow linearly with steps, so the larger
    share of the budgets in force is the progress that the learning rate follows.
    """
    batch = max(1, hyper.batch_tokens // CONTEXT)
    some_windows = held_out[:: max(1, len(held_out) // CURVE_WINDOWS)]
    device, offsets = stream.device, torch.arange(CONTEXT + 1, device=stream.device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": hyper.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=hyper.peak_lr, betas=hyper.betas, fused=device.type == "cuda",
    )

    def sample() -> torch.Tensor:
        starts = torch.randint(len(stream) - CONTEXT, (batch, 1), device=device)
        return stream[starts + offsets]

    model.train()
    curve, best = [], (math.inf, {})
    with residual_dropout(model, hyper.dropout), tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        loss_of, how = compile_or_not(loss_function(model), sample()) if device.type == "cuda" else (loss_function(model), "eager")
        model.zero_grad(set_to_none=True)
        began, step, progress, next_row = time.perf_counter(), 0, 0.0, 0.02
        running = torch.zeros((), device=device)
        running_steps = 0
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, hyper)
            loss = loss_of(sample())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running += loss.detach()
            running_steps += 1
            step += 1
            if step % 16 == 0 and device.type == "cuda":  # or the queue of launches runs ahead of the clock that ends the training
                torch.cuda.synchronize()
            now = time.perf_counter()
            spent = step / steps if steps else (now - began) / max(deadline - began, 1e-9)
            progress = max(spent, step * batch * CONTEXT / (hyper.max_epochs * len(stream)))
            if progress >= next_row or progress >= 1:
                next_row = progress + 0.02
                row = {
                    "step": step,
                    "epoch": round(step * batch * CONTEXT / len(stream), 3),
                    "seconds": round(now - began, 1),
                    "lr": learning_rate(progress, hyper),
                    "train_loss": running.item() / running_steps,
                    "validation_loss": validation_loss(model, some_windows, batch),
                }
                curve.append(row)
                running.zero_()
                running_steps = 0
                if row["validation_loss"] < best[0]:
                    best = (row["validation_loss"], {k: v.detach().cpu().clone() for k, v in model.state_dict().items()})
                bar.set_postfix_str(f"step {step}, loss {row['train_loss']:.3f}, validation {row['validation_loss']:.3f}")
                bar.update(min(100, round(100 * progress)) - bar.n)
    seconds = time.perf_counter() - began
    model.load_state_dict(best[1])
    tokens = step * batch * CONTEXT
    summary = {"steps": step, "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
               "execution": how, "best_step": min(curve, key=lambda r: r["validation_loss"])["step"]}
    return curve, summary


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> int:
    """Write weights (bfloat16), configs and tokenizer, and return the bytes of safetensors; raises ValueError past SIZE_LIMIT."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD,
        model_max_length=CONTEXT, padding_side="left", clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are written 0600, which a wheel would carry into other people's site-packages
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if size > SIZE_LIMIT:
        raise ValueError(f"save: {size} bytes of safetensors in {folder} exceed the limit of {SIZE_LIMIT}; make SHAPE smaller")
    return size


def check_saved(folder: Path, held_out: torch.Tensor, batch: int) -> tuple[float, list[str]]:
    """Return the validation loss of the files as anyone would load them, and what they write after each of PROMPTS."""
    on_gpu = held_out.is_cuda  # a CPU computes the same bfloat16 weights in float32, which it is faster at
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if on_gpu else torch.float32).to(held_out.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss = validation_loss(model, held_out, batch)
    model.eval()
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=96, do_sample=False)
        samples.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return loss, samples


def render_log(log: dict) -> str:
    """Return the log as Markdown."""
    corpus, result, run = log["corpus"], log["result"], log["run"]
    rows = [f"| {r['step']} | {r['epoch']:.2f} | {r['seconds']} | {r['lr']:.2e} | {r['train_loss']:.4f} | {r['validation_loss']:.4f} |"
            for r in log["curve"]]
    samples = [f"```python\n{sample}\n```" for sample in result["samples"]]
    return "\n".join([
        "# How the embedded model was trained", "",
        f"`{log['command']}` on {log['device']}, {log['date']}: {run['steps']} steps, {run['tokens']:,} tokens in {run['seconds']} s"
        f" ({run['tokens_per_second']:,} tokens/s, {run['execution']}); {log['total_seconds']} s from start to saved files.", "",
        f"* Text: the standard library in {corpus['folder']}: {corpus['files']} distinct files, {corpus['bytes']:,} bytes,"
        f" {corpus['train_tokens']:,} tokens to train and {corpus['validation_tokens']:,} held out"
        f" ({corpus['validation_files']} files, chosen by the hash of their path).",
        f"* Skipped folders: {', '.join(corpus['skipped_folders'])}.",
        "* Licence of the text: PSF License Version 2 (https://docs.python.org/3/license.html).",
        f"* Versions: {', '.join(f'{k} {v}' for k, v in log['versions'].items())}.",
        f"* Shape: {', '.join(f'{k} {v}' for k, v in log['shape'].items())}.",
        f"* Size: {result['parameters']:,} parameters, {result['bytes']:,} bytes of safetensors.",
        f"* Hyperparameters: {', '.join(f'{k} {v}' for k, v in log['hyperparameters'].items())}.",
        f"* Kept: step {run['best_step']}, the best validation loss. The saved bfloat16 files, loaded again:"
        f" **{result['validation_loss']:.4f} nats a token, perplexity {result['perplexity']:.2f},"
        f" {result['bits_per_byte']:.3f} bits a byte**.", "",
        "| step | epoch | seconds | learning rate | training loss | validation loss |", "|---|---|---|---|---|---|", *rows, "",
        "What the saved files write, greedily, after the first lines of each:", "", *samples, "",
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and the log")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall clock for everything, tokenizer and compilation included")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="another Python's lib folder")
    for name in ("batch_tokens", "peak_lr", "dropout", "weight_decay", "max_epochs", "seed"):
        default = getattr(Hyperparameters, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}")
    options = parser.parse_args()
    given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items()
             if name not in ("out", "stdlib", "device") and value != parser.get_default(name)]
    fields = Hyperparameters.__dataclass_fields__
    hyper = Hyperparameters(**{name: value for name, value in vars(options).items() if name in fields})

    began, reserve = time.perf_counter(), 10.0  # seconds for writing the files, loading them again and sampling from them
    device = torch.device(options.device)
    torch.manual_seed(hyper.seed)
    torch.set_float32_matmul_precision("high")

    train_texts, held_out_texts = read_corpus(options.stdlib)
    tokenizer = train_tokenizer(train_texts, SHAPE["vocab_size"])
    stream = token_stream(tokenizer, train_texts, device)
    held_out = validation_windows(token_stream(tokenizer, held_out_texts, device))
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)
    corpus = {
        "folder": options.stdlib.name,
        "files": len(train_texts) + len(held_out_texts),
        "bytes": sum(len(text.encode()) for text in train_texts) + held_out_bytes,
        "train_tokens": len(stream),
        "validation_tokens": held_out.numel(),
        "validation_files": len(held_out_texts),
        "skipped_folders": sorted(SKIPPED_FOLDERS),
    }
    print(f"{corpus['files']} files, {len(stream):,} tokens, tokenized after {time.perf_counter() - began:.1f} s", flush=True)

    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = LlamaConfig(
        **SHAPE, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )
    model = build_model(config, device)
    curve, run = train(model, stream, held_out, hyper, began + 60 * options.minutes - reserve, options.steps)
    size = save(model, tokenizer, options.out)
    loss, samples = check_saved(options.out, held_out, max(1, hyper.batch_tokens // CONTEXT))

    log = {
        "command": " ".join(["python -m ftops.integrations.demo.train", *given]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "corpus": corpus,
        "shape": SHAPE | {"context": CONTEXT},
        "hyperparameters": asdict(hyper),
        "run": run,
        "result": {"validation_loss": loss, "perplexity": math.exp(loss),
                   "bits_per_byte": loss / math.log(2) * held_out.numel() / held_out_bytes,
                   "parameters": sum(p.numel() for p in model.parameters()), "bytes": size, "samples": samples},
        "curve": curve,
        "total_seconds": round(time.perf_counter() - began, 1),
    }
    (options.out / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")
    (options.out / "training_log.md").write_text(render_log(log))
    print(f"{options.out}: {size:,} bytes, validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {log['total_seconds']} s")


if __name__ == "__main__":
    main()
