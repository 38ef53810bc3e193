"""Load a checkpoint in which some weights W are stored as two factors, `W = B A`: fewer numbers, and fewer operations,
where the rank is low.

    from load_factored import load_factored
    model = load_factored("factored")

It needs torch, transformers and safetensors, nothing else of this project, so a copy of it lies beside the checkpoint.
transformers has no such form of its own, and asks for custom ones to be registered as quantization methods
(https://huggingface.co/docs/transformers/quantization/contribute); nothing is quantized.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "factored"


def load_factored(folder: str | Path, **options: Any) -> Any:
    """The model, its dropout off.

    Args:
        folder: with the checkpoint, as it was downloaded.
        options: of transformers' `from_pretrained`, `device_map` say.
    """
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(FactoredConfig)
        register_quantizer(METHOD)(FactoredWeights)
    config = json.loads((Path(folder) / "config.json").read_text())
    masked = any(name.endswith("ForMaskedLM") for name in config.get("architectures") or ())
    auto_model: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return auto_model.from_pretrained(folder, **{"dtype": "auto", **options}).eval()


class FactoredLinear(nn.Module):
    """`x A^T B^T + bias`, as a linear layer with the weight `B A`."""

    def __init__(self, out: int, in_: int, rank: int, bias: nn.Parameter | None, like: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(like.new_empty(rank, in_), requires_grad=False)
        self.B = nn.Parameter(like.new_empty(out, rank), requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(out, in) the product, for code that asks a module for its weight (GPT-2's initialisation does)."""
        return self.B @ self.A

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (..., in)

        Returns:
            (..., out)
        """
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B, self.bias)


class FactoredConfig(QuantizationConfigMixin):
    """`quantization_config` of the config.json."""

    def __init__(self, ranks: dict[str, int], **_: Any) -> None:
        """
        Args:
            ranks: of each module whose weight is in two factors, by its name in the model.
        """
        method: Any = METHOD
        self.quant_method = method
        self.ranks = ranks


class FactoredWeights(HfQuantizer):
    """Puts factored modules where the checkpoint has factors, before its tensors are read."""

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config: Any = self.quantization_config
        ranks: dict[str, int] = config.ranks
        for name, rank in ranks.items():
            old = model.get_submodule(name)
            weight = old.get_parameter("weight")
            out, in_ = weight.shape if isinstance(old, nn.Linear) else weight.shape[::-1]  # Conv1D has (in, out)
            bias = getattr(old, "bias", None)
            with torch.device(weight.device):
                new = FactoredLinear(out, in_, rank, bias, weight)
            model.set_submodule(name, new)

    def is_serializable(self) -> bool:
        """Whether the model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained."""
        return False
