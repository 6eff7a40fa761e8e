"""ftops.QuantConfig: which weights of a model are quantised, and how; transformers takes it as `quantization_config`."""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ftops.quant import FORMATS

METHOD = "ftops"
VERSION = 1  # of what is stored beside the weights
Choice = str | dict[str, Any] | None


@dataclass(frozen=True)
class Spec:
    """A format and the options of its `quantize`. Raises ValueError for one that it does not take."""

    format: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"quantize: format is {self.format!r}; allowed: {', '.join(FORMATS)}")
        try:
            with torch.device("cpu"):  # transformers asks while it makes a model on the meta device
                FORMATS[self.format].quantize(torch.zeros(1, 1), **self.options)
        except TypeError:
            raise ValueError(f"quantize: {self.format} has no option {' and '.join(self.options)}; "
                             "int4 has group_size and zero_points, fp8 has per_tensor") from None

    @property
    def group_size(self) -> int | None:
        """Values of k that share a scale; None: all of a row."""
        return self.options.get("group_size", 128) if self.format == "int4" else None


def _spec(choice: Choice) -> Spec | None:
    if choice is None:
        return None
    options = {"format": choice} if isinstance(choice, str) else dict(choice)
    return Spec(options.pop("format", None), options)


class QuantConfig(QuantizationConfigMixin):
    """`format`, int4, int8, fp8 or w8a8, for all linear layers but the output head, and what differs from that.

    group_size (32, 64 or 128) and zero_points: of int4. per_tensor: of fp8. embeddings, head: None (kept as they are), a format, or a dict
    of a format and its options; embeddings take int8 and fp8. overrides: the same by pattern of module paths, of which the first
    that matches counts: {"*.down_proj": "int8", "model.layers.0.*": None, "*.o_proj": {"format": "int4", "group_size": 32}}.
    Raises ValueError.
    """

    def __init__(self, format: str = "int4", *, group_size: int | None = None, zero_points: bool = False, per_tensor: bool = False,
                 embeddings: Choice = None, head: Choice = None, overrides: dict[str, Choice] | None = None, version: int = VERSION,
                 quant_method: str = METHOD) -> None:
        if quant_method != METHOD or version != VERSION:
            raise ValueError(f"quantize: quant_method is {quant_method!r}, version {version}; allowed: {METHOD!r}, version {VERSION}")
        self.quant_method, self.version = quant_method, version
        self.format, self.group_size, self.zero_points, self.per_tensor = format, group_size, zero_points, per_tensor
        self.embeddings, self.head, self.overrides = embeddings, head, dict(overrides or {})
        for choice in (embeddings, head, *self.overrides.values(), format):
            _spec(choice)
        self.spec  # noqa: B018  its options are checked when it is made

    @property
    def spec(self) -> Spec:
        options = {"group_size": self.group_size, "zero_points": self.zero_points, "per_tensor": self.per_tensor}
        return Spec(self.format, {name: value for name, value in options.items() if value not in (None, False)})

    @property
    def head_spec(self) -> Spec | None:
        return _spec(self.head)

    @property
    def embeddings_spec(self) -> Spec | None:
        return _spec(self.embeddings)

    def override(self, pattern: str) -> Spec | None:
        return _spec(self.overrides[pattern])


def as_config(quant: object, options: dict[str, Any]) -> QuantConfig:
    """A format's name with options, or a QuantConfig. Raises ValueError."""
    if isinstance(quant, QuantConfig):
        if options:
            raise ValueError(f"quantize: {', '.join(options)} beside a QuantConfig; give its own constructor the options")
        return quant
    if not isinstance(quant, str):
        raise ValueError(f"quantize: the format is {quant!r}; allowed: {', '.join(FORMATS)} or an ftops.QuantConfig")
    try:
        return QuantConfig(quant, **options)
    except TypeError as error:
        raise ValueError(f"quantize: {error}; allowed: the options of ftops.QuantConfig") from None
