"""AWQ and GPTQ checkpoints as ftops models: their tensors become int4 as they are read, and transformers is given those."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ftops.integrations.transformers.quantizer import STORED, QuantConfig
from ftops.quant.foreign import FOREIGN
from ftops.quant.storage import Stored

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_foreign(files: Iterable[Path], method: str, options: dict[str, Any]) -> tuple[Stored, dict[str, torch.Tensor]]:
    """What the files hold, and it as ftops' own tensors by name. Raises ValueError, naming the layer, for what int4 cannot be."""
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load: {file} is damaged, cut short or no safetensors file: {error}; download it again") from None
    weights = {}
    for path in [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]:
        parts = {part: state.pop(f"{path}.{part}") for part in PARTS if f"{path}.{part}" in state}
        try:
            qw = FOREIGN[method](parts, options)
        except ValueError as error:
            raise ValueError(f"load: {path}: {error}") from None
        state |= {f"{path}.{name}": tensor for name, tensor in qw.tensors.items()}
        weights[path] = qw.to("meta")
    if not weights:
        raise ValueError(f"load: the files have no qweight, and config.json says that they are of {method}")
    return Stored(weights, {name: tensor.to("meta") for name, tensor in state.items()}), state


def load_foreign(kind: type[PreTrainedModel], folder: Path, files: Iterable[Path], quantisation: dict[str, Any],
                 **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and what transformers says of its loading; in the dtype of the scales, so that nothing is rounded."""
    stored, state = read_foreign(files, quantisation["quant_method"], quantisation)
    first = next(iter(stored.weights.values()))
    config = kind.config_class.from_pretrained(folder)
    config.quantization_config = QuantConfig("int4", group_size=first.metadata["group_size"],
                                             zero_points=first.tensors["scales"].dim() == 5).to_dict()
    token = STORED.set(stored)
    try:
        model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=first.dtype, **options)
    finally:
        STORED.reset(token)
    model.config._name_or_path = str(folder)
    return model, info
