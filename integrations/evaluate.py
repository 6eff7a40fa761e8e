"""What `ftops evaluate` and `ftops quantize` do: how good a quantised model still is, measured on text, and its folder."""
from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging

import ftops
from ftops.integrations.demo.corpus import is_held_out
from ftops.integrations.demo.load import EMBEDDED, load_causal_lm
from ftops.integrations.transformers.decoder import positions_of
from ftops.progress import track
from ftops.quant import FORMATS

LENGTH = 1024  # tokens of a window, if the model takes as many


@dataclass(frozen=True)
class Quality:
    """On the same windows of text: exp of the mean loss a token; the largest difference of a logit from the original's, and of
    those the largest; bytes of parameters and quantised weights."""

    name: str
    perplexity: float
    logit_error: float
    largest_logit: float
    nbytes: int


def evaluate(model: str | Path | None = None, quant: list[str] | None = None, *, text: str | Path | None = None, windows: int = 8,
             device: str | None = None, dtype: str | None = None, options: dict[str, Any] | None = None) -> list[Quality]:
    """The original as transformers runs it, then each format, patched, on the first `windows` windows of a text file.

    model: a folder or a Hugging Face hub id; None is the embedded one. quant: formats; None is all. text: None is Python's own modules,
    those that the embedded model was not shown. options: of ftops.QuantConfig. Raises ValueError.
    """
    if windows < 1:
        raise ValueError(f"evaluate: --windows is {windows}; allowed: 1 or more")
    check_formats("evaluate", *quant or ())
    configs = {name: ftops.QuantConfig(name, **(options or {})) for name in quant or FORMATS}
    written = _text(text)
    logging.disable_progress_bar()

    def load(**more: Any) -> tuple[PreTrainedModel, Any]:
        return load_causal_lm(model or EMBEDDED, device=device, dtype=dtype, asked=("evaluate", "MODEL"), original=True, **more)

    original, tokenizer = load()
    tokens = _windows(tokenizer(written, return_tensors="pt", verbose=False).input_ids[0], original)[:windows].to(original.device)
    theirs = [logits.cpu() for logits in _logits(original, tokens, "original")]
    found = [_quality("original", original, tokens, iter(theirs), theirs)]
    del original
    for name, config in configs.items():
        quantised = ftops.patch(load(quantization_config=config)[0])
        found.append(_quality(name, quantised, tokens, _logits(quantised, tokens, name), theirs))
        del quantised
    return found


def show(console: Console, found: list[Quality]) -> None:
    table = Table("weights", title=f"Perplexity, and how far logits are from the original's (largest {found[0].largest_logit:.1f})",
                  title_justify="left")
    for column in ("MiB", "perplexity", "to the original", "largest logit error"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(one.name, f"{one.nbytes / 2**20:.1f}", f"{one.perplexity:.4f}", f"{one.perplexity / found[0].perplexity:.4f} x",
                      f"{one.logit_error:.4f}")
    console.print(table)


def quantize(model: str | Path | None, folder: str | Path, quant: str, *, device: str | None = None, dtype: str | None = None,
             options: dict[str, Any] | None = None) -> PreTrainedModel:
    """Quantises a model as it is read, and saves it with its tokenizer in a new folder. Raises ValueError."""
    check_formats("quantize", quant)
    quantised, tokenizer = load_causal_lm(model or EMBEDDED, device=device, dtype=dtype, asked=("quantize", "MODEL"), original=True,
                                          quantization_config=ftops.QuantConfig(quant, **(options or {})))
    ftops.save(quantised, folder, tokenizer=tokenizer)
    return quantised


def check_formats(command: str, *names: str) -> None:
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"{command}: --quant is {name!r}; allowed: {', '.join(FORMATS)}")


def library_text() -> str:
    """Modules of Python's standard library, those that the embedded model was not shown."""
    files = [path for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if is_held_out(Path(path.name))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def weight_bytes(model: PreTrainedModel) -> int:
    """Of parameters and quantised weights; what is shared counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def _text(file: str | Path | None) -> str:
    if file is None:
        return library_text()
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluate: --text is {file}, which cannot be read as UTF-8 text: {error}") from None


def _windows(tokens: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Consecutive windows [n, length] of tokens[T]; of a short text its only, shorter one."""
    length = min(LENGTH, positions_of(model) or LENGTH, len(tokens))
    if length < 2:
        raise ValueError(f"evaluate: --text has {len(tokens)} tokens; allowed: 2 or more")
    return tokens[: len(tokens) // length * length].view(-1, length)


@torch.inference_mode()
def _logits(model: PreTrainedModel, windows: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
    """The logits [S,V] of each window, one at a time."""
    for window in track(windows, name, len(windows)):
        yield model(input_ids=window[None], use_cache=False).logits[0]


def _quality(name: str, model: PreTrainedModel, windows: torch.Tensor, ours: Iterator[torch.Tensor], theirs: list[torch.Tensor]) -> Quality:
    loss, error, largest, count = 0.0, 0.0, 0.0, 0
    for window, logits, original in zip(windows.cpu(), ours, theirs, strict=True):
        logits, original = logits.float().cpu(), original.float()
        loss += torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
        error, largest = max(error, (logits - original).abs().max().item()), max(largest, original.abs().max().item())
        count += len(window) - 1
    return Quality(name, math.exp(loss / count), error, largest, weight_bytes(model))
