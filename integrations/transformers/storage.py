"""ftops.save and ftops.load: a quantised model as a folder of safetensors, all of it or nothing."""
from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ftops.integrations.transformers.config import METHOD
from ftops.integrations.transformers.foreign import load_foreign
from ftops.integrations.transformers.quantizer import QuantConfig
from ftops.quant.foreign import FOREIGN
from ftops.quant.module import Quantized

# What transformers' tokenizers are kept in, for a model whose folder is known.
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.jinja")


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None, max_shard_size: str = "5GB") -> None:
    """See `ftops.save`."""
    folder = Path(folder).expanduser()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"save: model is a {type(model).__name__}; pass a model of transformers")
    if not any(isinstance(module, Quantized) for module in model.modules()):
        raise ValueError("save: the model has no quantised weights; ftops.quantize(model, ...) first, or model.save_pretrained(folder)")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save: {folder} is there and not empty; pass another folder, or remove it")
    beside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(beside, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        else:
            source = Path(getattr(model.config, "_name_or_path", None) or "-")
            for file in {file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if source.is_dir()}:
                shutil.copy(file, beside)
        for file in beside.iterdir():
            file.chmod(0o644)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def load(folder: str | Path, device: str | torch.device | None = None) -> PreTrainedModel:
    """See `ftops.load`."""
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"load: device is {device!r} but PyTorch finds no CUDA device; pass 'cpu' (`ftops info` says what is missing)")
    folder = Path(folder).expanduser()
    config = _json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (METHOD, *FOREIGN):
        raise ValueError(f"load: {folder} is {f'quantised by {method}' if method else 'not quantised'}; allowed: what ftops.save wrote, "
                         "awq, gptq. Others: AutoModelForCausalLM.from_pretrained(folder, quantization_config=ftops.QuantConfig(...))")
    name = (config.get("architectures") or ["none"])[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"load: {folder / 'config.json'} names the architecture {name}, which transformers {transformers.__version__} "
                         "does not have")
    files = _files(folder)
    options: dict[str, Any] = {"device_map": device, "local_files_only": True, "output_loading_info": True}
    if method == METHOD:
        QuantConfig.from_dict(config["quantization_config"])
        model, info = kind.from_pretrained(folder, use_safetensors=True, **options)
    else:
        model, info = load_foreign(kind, folder, files, config["quantization_config"], **options)
    for what, key in (("misses", "missing_keys"), ("has besides", "unexpected_keys")):
        names = sorted(info[key])
        if names:
            raise ValueError(f"load: {folder} is not a whole {name}: it {what} {', '.join(names[:3])}"
                             + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
    return model


def _files(folder: Path) -> list[Path]:
    """Where the weights are: one file, or all that an index names. Raises ValueError."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise ValueError(f"load: {folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}; pass a folder that "
                             "ftops.save wrote")
        return [folder / SAFE_WEIGHTS_NAME]
    held = _json(index).get("weight_map")
    if not isinstance(held, dict) or not all(isinstance(name, str) and Path(name).name == name for name in held.values()):
        raise ValueError(f"load: {index} has no weight_map of file names; write or download it again")
    missing = sorted({name for name in held.values() if not (folder / name).is_file()})
    if missing:
        raise ValueError(f"load: {index} names {', '.join(missing)}, which {folder} has not; download the whole folder")
    return [folder / name for name in sorted(set(held.values()))]


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"load: there is no {file}; pass a folder that ftops.save wrote") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {file} cannot be read: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"load: {file} holds a {type(read).__name__} instead of an object")
    return read
