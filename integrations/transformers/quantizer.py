"""transformers' quantizer: from_pretrained(..., quantization_config=ftops.QuantConfig("int4")), save_pretrained, and back.

Each weight is quantised as it comes from its file, on the device it is for, and the next one is read then.
"""
from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer

from ftops.integrations.transformers.calibration import largest_inputs, smoothing_scales
from ftops.integrations.transformers.config import METHOD, QuantConfig, as_config
from ftops.integrations.transformers.quantized import Target, check_values, put, quantize_targets, quantize_weight, restore, targets
from ftops.quant import QuantizedWeight
from ftops.quant.module import Quantized
from ftops.quant.storage import Stored, describe, read

__all__ = ["STORED", "QuantConfig", "quantize"]

# What a checkpoint holds that from_pretrained is given as tensors instead of files.
STORED: ContextVar[Stored | None] = ContextVar("stored", default=None)


def quantize(model: nn.Module, quant: str | QuantConfig, calibration: Any = None, **options: Any) -> nn.Module:
    """See `ftops.quantize`. All that can be wrong is said before anything is changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}; pass a torch.nn.Module, such as from_pretrained gives")
    config = as_config(quant, options)
    found = targets(model, config)
    check_values(found)
    smooth = None if calibration is None else smoothing_scales(model, found, largest_inputs(model, found, calibration))
    quantize_targets(model, found, smooth)
    if hasattr(model, "config"):  # a model of transformers: save_pretrained asks these
        quantizer = Quantizer(config, pre_quantized=False)
        model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
        quantizer.postprocess_model(model)
    return model


class Quantizer(HfQuantizer):
    """A checkpoint of 16-bit weights is quantised as it is read; one that ftops wrote (`pre_quantized`) is read as it is."""

    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.left: dict[str, Target] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any) -> nn.Module:
        if not self.pre_quantized:
            self.left = targets(model, self.quantization_config)
        else:
            stored = STORED.get() or read(checkpoint_files or ())
            for path, qw in stored.weights.items():
                _hold(model, path, qw)
            _compare(model, stored.tensors)
            # Some models tie their head whatever the configuration says.
            held = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Quantized)}
            model.all_tied_weights_keys = {name: source for name, source in model.all_tied_weights_keys.items()
                                           if not held & {name, source}}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        quantize_targets(model, self.left)  # the weights that others share
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}  # transformers ties them after reading, and we later
        return name == "weight" and path in self.left and param_name not in tied

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes, for whoever spreads a model over devices before it is read."""
        target = self.left.get(param_name.rpartition(".")[0])
        if target is None or not param_name.endswith(".weight"):
            return super().param_element_size(model, param_name, param)
        return 0.5 + 4 / target.spec.group_size if target.spec.group_size else 1.0

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        return None, {"ftops": describe(model)}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        restore(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """A weight as it was read -> its module, quantised; nothing is left for transformers to put anywhere."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: nn.Module | None = None,
                missing_keys: set[str] | None = None, **_: Any) -> dict[str, torch.Tensor]:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        path = full_layer_name.rpartition(".")[0]
        target = self.quantizer.left[path]
        if tuple(target.oriented(weight).shape) != target.shape:
            raise ValueError(f"load: {full_layer_name} is {tuple(weight.shape)} in the file and {tuple(target.module.weight.shape)} in the "
                             "model")
        put(model, target, quantize_weight(weight, target))
        del self.quantizer.left[path]
        missing_keys.discard(full_layer_name)
        return {}


def _hold(model: nn.Module, path: str, qw: QuantizedWeight) -> None:
    """Makes a place for a stored weight: a base model is read from files of a whole one, and the other way round."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    found = next((name for name in (path, path.removeprefix(prefix), prefix + path) if name in modules), None)
    if found is None:
        if path.startswith(prefix) or not hasattr(model, model.base_model_prefix):
            return  # the head of another model
        raise ValueError(f"load: the files have a quantised {path}, and {type(model).__name__} has no such module: they are of another "
                         "model")
    module = modules[found]
    target = Target.of(module)
    if target is None or target.shape != qw.shape:
        raise ValueError(f"load: {path} is {qw.shape[0]} x {qw.shape[1]} in the files, and in the model "
                         + (f"a {type(module).__name__}" if target is None else f"{target.shape[0]} x {target.shape[1]}")
                         + "; config.json and the weights are of different models")
    put(model, target, qw)


def _compare(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError for a tensor that has another shape in the files than in the model."""
    for name, tensor in model.state_dict().items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise ValueError(f"load: {name} is {tuple(tensors[name].shape)} in the files and {tuple(tensor.shape)} in the model; "
                             "config.json and the weights are of different models")


register_quantization_config(METHOD)(QuantConfig)
register_quantizer(METHOD)(Quantizer)
