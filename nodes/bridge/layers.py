"""ComfyUI's layers for networks that are made of PyTorch's, and for files that the core reads."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

_PLAIN = comfy.ops.disable_weight_init


class ReadyLayers(comfy.ops.manual_cast):
    """ComfyUI's casting layers, whose weights are there once they are built.

    With dynamic VRAM ComfyUI's linear layer makes them only when it loads its own way, so a file could not be checked
    against the model; a layer that loads as PyTorch's does is left alone.
    """

    class Linear(comfy.ops.manual_cast.Linear):
        """See above."""

        def _load_from_state_dict(self, *args: Any) -> None:
            nn.Linear._load_from_state_dict(self, *args)


class LookedUp(_PLAIN.Embedding):
    """An embedding that is read where it lies: rows travel to the device, not the table."""

    def forward_comfy_cast_weights(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Rows (..., D) on the device of the ids."""
        if self.weight_function:
            return super().forward_comfy_cast_weights(input, out_dtype)
        rows = nn.functional.embedding(input.to(self.weight.device), self.weight, self.padding_idx)
        return rows.to(input.device, out_dtype)


CASTABLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _PLAIN.Linear, nn.Embedding: LookedUp, nn.LayerNorm: _PLAIN.LayerNorm,
    nn.Conv2d: _PLAIN.Conv2d, nn.Conv3d: _PLAIN.Conv3d,
}  # fmt: skip
"""PyTorch's layers -> ComfyUI's of the same arithmetic, whose weights may wait in CPU memory until they are used."""


def make_castable(network: nn.Module) -> None:
    """Give the layers of a network ComfyUI's classes, in place; names, weights and results stay the same."""
    for part in network.modules():
        if type(part) in CASTABLE:
            part.__class__ = CASTABLE[type(part)]
            if not hasattr(part, "bias"):
                part.bias = None  # ComfyUI casts weight and bias together


class PartlyCastable(comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher for a network that also has parts of other classes, such as transformers' own norms.

    ComfyUI moves those only where everything fits. They are small and cannot be cast, so they, and buffers, always lie
    where the network computes.
    """

    def load(self, device_to: torch.device | None = None, *args: Any, **kwargs: Any) -> None:
        """Load as much as ComfyUI says, and the small parts."""
        super().load(device_to, *args, **kwargs)
        self._settle(device_to)

    def partially_unload(self, device_to: torch.device, *args: Any, **kwargs: Any) -> int:
        """Free memory, but of the small parts."""
        freed = super().partially_unload(device_to, *args, **kwargs)
        self._settle(self.load_device)
        return freed

    def _settle(self, device: torch.device) -> None:
        for name, part in self.model.named_modules():
            if hasattr(part, "comfy_cast_weights"):
                continue
            owned = dict(part.named_parameters(recurse=False))
            if getattr(part, "comfy_patched_weights", False) is not True:
                for key in owned:
                    self.patch_weight_to_device(f"{name}.{key}", device_to=device)
            part._apply(lambda tensor: tensor.to(device), recurse=False)
            if owned:
                part.comfy_patched_weights = True  # ComfyUI's mark for: patched, and on the device
