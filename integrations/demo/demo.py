"""What `ftops demo` does: two real models, each as Hugging Face runs it and patched, and whether their outputs are the same.

An encoder (MiniLM-L6, its published weights) embeds sentences; a generator (the embedded model, trained by train.py) continues
Python code, greedily. Each runs under Hugging Face's "eager" attention, which is the baseline of every comparison, under its "sdpa"
attention, which is what from_pretrained gives, and patched.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

import ftops
from ftops.integrations.demo.load import DTYPES, load_causal_lm, load_encoder

BASELINE = "eager"
# Of unit vectors. 16-bit: eight times the rounding of the largest component met, some 0.25; float32: sums in another order.
EMBEDDING_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SENTENCES = (
    "How do I sort a list in Python?",
    "The list.sort() method orders the items of a list in place, and sorted() returns a new list.",
    "What should I cook for dinner tonight?",
    "A quick supper: fry garlic in olive oil, add tomatoes and basil, and toss the pasta in the pan until it is coated.",
    "Why is the sky blue?",
    "Air molecules scatter the short wavelengths of sunlight more than the long ones, and so blue light reaches us from every direction.",
    "Rome.",
    "The capital of Italy lies on the river Tiber; its founding is traditionally dated to 753 BC.",
    "Graphics processors run thousands of threads at once and hide the latency of memory behind other work.",
    "She tuned the violin before the concert.",
    "The orchestra rehearsed the second movement until midnight.",
    "Interest rates were left unchanged by the central bank on Thursday.",
)
QUESTIONS = (0, 2, 4, 6)  # sentences whose nearest neighbour is shown
PROMPTS = (
    "class TestQueue(unittest.TestCase):\n\n    def setUp(self):",
    "import os\nimport sys\n\ndef main():",
    "def is_prime(n):",
    "class Node:\n    def __init__(self, value, next=None):",
)


@dataclass(frozen=True)
class Timing:
    """Median seconds of one pass after warm-up, and the most memory that PyTorch held on the GPU meanwhile (None on a CPU)."""

    name: str
    seconds: float
    peak_bytes: int | None


def demo(*, device: str | None = None, dtype: str | None = None, runs: int = 5, max_new_tokens: int = 64) -> bool:
    """Runs both jobs, prints what they show and returns whether the patched outputs are the same within tolerance.

    dtype: a name in load.DTYPES; None is float32 on a CPU, and on a GPU float16 for the encoder and the checkpoint's bfloat16 for the
    generator. Raises ValueError.
    """
    if runs < 1 or max_new_tokens < 1:
        raise ValueError(f"demo: --runs is {runs} and --max-new-tokens is {max_new_tokens}; allowed: 1 or more")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    same = [job(console, device, dtype, runs, max_new_tokens) for job in (_encoder, _generator)]
    return all(same)


def _encoder(console: Console, device: str | None, dtype: str | None, runs: int, _: int) -> bool:
    model, tokenizer = load_encoder(device=device, dtype=dtype, attn_implementation=BASELINE)
    if dtype is None and model.device.type == "cuda":
        model.half()  # its checkpoint is float32, which tensor cores do not take
    inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(model.device)
    tokens = int(inputs.attention_mask.sum())
    _title(console, "Encoder: MiniLM-L6", model, f"{len(SENTENCES)} sentences, {tokens} tokens padded to {inputs.input_ids.numel()}")

    def embed() -> torch.Tensor:
        return mean_pool(model(**inputs).last_hidden_state, inputs.attention_mask)

    before, after, timings = _before_and_after(model, embed, embed, runs)
    difference = (after - before).abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(after.double(), before.double()).min().item()
    allowed = EMBEDDING_TOLERANCE[model.dtype]
    same = difference <= allowed  # NaN is not the same

    nearest = Table("sentence", "nearest of the others", "cosine", title="What the patched model finds", title_justify="left")
    similarity = after @ after.T - 2 * torch.eye(len(after), device=after.device)
    for question in QUESTIONS:
        answer = int(similarity[question].argmax())
        nearest.add_row(SENTENCES[question], SENTENCES[answer], f"{similarity[question, answer]:.3f}")
    console.print(nearest)
    _timing_table(console, timings, tokens)
    _verdict(console, same, f"smallest cosine {cosine:.7f}, largest difference {difference:.1e} of unit vectors, allowed {allowed:.0e}")
    console.print(ftops.report(model))
    return same


def _generator(console: Console, device: str | None, dtype: str | None, runs: int, max_new_tokens: int) -> bool:
    model, tokenizer = load_causal_lm(device=device, dtype=dtype, attn_implementation=BASELINE)
    inputs = tokenizer(list(PROMPTS), padding=True, return_tensors="pt").to(model.device)
    start = inputs.input_ids.shape[1]
    _title(console, "Generator: the embedded Llama", model, f"{len(PROMPTS)} prompts padded to {start} tokens, {max_new_tokens} new each")

    def write(**options: bool) -> object:
        return model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens,
                              do_sample=False, **options)

    def explain() -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens[B, n] and the logits[B, n, V] that they were chosen by."""
        made = write(output_logits=True, return_dict_in_generate=True)
        return made.sequences[:, start:], torch.stack(made.logits, 1).float()

    (before, logits), (after, _), timings = _before_and_after(model, explain, write, runs)
    tokens = int((before != tokenizer.pad_token_id).sum())  # a row that ended early is padded
    same, remark = compare_tokens(before, after, logits, model.dtype)

    for prompt, row in zip(PROMPTS, after, strict=True):
        text = prompt + tokenizer.decode(row, skip_special_tokens=True)
        console.print(Syntax(text, "python", background_color="default", word_wrap=True), "")
    _timing_table(console, timings, tokens)
    _verdict(console, same, remark)
    console.print(ftops.report(model))
    return same


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Embeddings of unit length [B, N], float32: the mean of hidden[B, S, N] over the tokens that mask[B, S] keeps."""
    weights = mask.unsqueeze(-1).float()
    return torch.nn.functional.normalize((hidden.float() * weights).sum(1) / weights.sum(1), dim=-1)


def compare_tokens(before: torch.Tensor, after: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether greedy tokens[B, n] are the same, and a sentence that says so, given the logits[B, n, V] of `before`.

    Two tokens whose logits differ by less than twice the rounding of the largest logit in `dtype` are a tie that any order of summation
    may break; the rows part there, so only their first difference says anything.
    """
    steps = min(before.shape[1], after.shape[1])
    total = before.numel()
    differs = before[:, :steps] != after[:, :steps]
    if before.shape == after.shape and not differs.any():
        return True, f"all {total} tokens are equal"
    ties, remarks = True, []
    for row in range(len(before)):
        places = differs[row].nonzero().flatten()
        if not len(places):
            continue
        step = int(places[0])
        scores = logits[row, step]
        gap = (scores[before[row, step]] - scores[after[row, step]]).item()
        rounding = 2 * torch.finfo(dtype).eps * scores.abs().max().item()
        ties &= gap <= rounding
        remarks.append(f"prompt {row + 1} differs from token {step + 1} on, where eager's logits of the two are {gap:.1e} apart "
                       f"(a tie in {_short(dtype)} up to {rounding:.1e})")
    return ties and bool(remarks), "; ".join(remarks) or f"{before.shape[1]} steps became {after.shape[1]}"


def _before_and_after(model: PreTrainedModel, output: Callable, work: Callable, runs: int) -> tuple:
    """What `output` returns under eager attention and patched, and a Timing of `work` each for eager, sdpa and patched."""
    with torch.inference_mode():
        before = output()
        timings = [_time(f"{BASELINE} (baseline)", model, work, runs)]
        model.set_attn_implementation("sdpa")
        timings.append(_time("sdpa (default)", model, work, runs))
        model.set_attn_implementation(BASELINE)
        ftops.patch(model)
        after = output()
        timings.append(_time("ftops.patch", model, work, runs))
    return before, after, timings


def _time(name: str, model: PreTrainedModel, work: Callable, runs: int) -> Timing:
    on_gpu = model.device.type == "cuda"
    work()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = []
    for _ in range(runs):
        _wait(on_gpu)
        began = time.perf_counter()
        work()
        _wait(on_gpu)
        seconds.append(time.perf_counter() - began)
    return Timing(name, statistics.median(seconds), torch.cuda.max_memory_allocated(model.device) if on_gpu else None)


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _title(console: Console, title: str, model: PreTrainedModel, work: str) -> None:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cpu()
    count = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    console.rule(f"[bold]{title}", align="left")
    console.print(f"{count / 1e6:.1f} M parameters, {size / 2**20:.1f} MiB in {_short(model.dtype)}, on {device}; {work}.")


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _timing_table(console: Console, timings: list[Timing], tokens: int) -> None:
    on_gpu = timings[0].peak_bytes is not None
    table = Table(title="Hugging Face's attention, and patched", title_justify="left")
    for column in ("run", "time", "tokens/s", "speed", *(["peak GPU memory"] if on_gpu else [])):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold", no_wrap=column != "run")
    for timing in timings:
        peak = [f"{timing.peak_bytes / 2**20:.1f} MiB"] if on_gpu else []
        table.add_row(timing.name, f"{1e3 * timing.seconds:.2f} ms", f"{tokens / timing.seconds:,.0f}",
                      f"{timings[0].seconds / timing.seconds:.2f} x", *peak)
    console.print(table)


def _verdict(console: Console, same: bool, remark: str) -> None:
    console.print(f"Output: {'[green]same' if same else '[bold red]DIFFERENT'}[/] ({remark})", soft_wrap=True)


def _short(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)
