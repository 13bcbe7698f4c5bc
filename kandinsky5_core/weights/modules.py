"""Our modules on the meta device: parameters without storage, to be filled from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..config import DiTConfig, VAEConfig


class ParametersOnMeta(TorchFunctionMode):
    """While active, `torch.empty` allocates nothing (meta device).

    Layers make their parameters with `torch.empty`, so those cost no memory; buffers computed in a constructor (by
    arange and the like) come out real, which `torch.device('meta')` would lose.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """`build()` with parameters on meta and computed buffers real."""
    with ParametersOnMeta():
        return build()


def module_for(config: DiTConfig | VAEConfig, ops: ModuleType = torch.nn) -> torch.nn.Module:
    """Our module of these sizes (call inside `build_on_meta` to allocate nothing)."""
    if isinstance(config, DiTConfig):
        from ..dit.model import DiffusionTransformer

        return DiffusionTransformer(config, ops=ops)
    if config.kind == "hunyuan":
        from ..vae.hunyuan.model import HunyuanVAE

        return HunyuanVAE(config, ops=ops)
    from ..vae.flux import FluxVAE

    return FluxVAE(config, ops=ops)


def tensor_shapes(config: DiTConfig | VAEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor a checkpoint of these sizes has."""
    module = build_on_meta(lambda: module_for(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
