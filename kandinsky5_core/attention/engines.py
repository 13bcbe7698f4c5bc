"""The engines that can compute dense attention: which are here, probed once for a device, and chosen by name.

Nothing is kept between calls: `probe_engines` makes a small frozen object, and who made it hands it on.
Shape legend: B batch, N queries, M keys, d head_dim; engines take and give (B, heads, tokens, d).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .dense import AttentionFn, dense_attention

PROBE_ERROR = 0.1
"""How far an engine may be from PyTorch on random numbers; a broken kernel is further away."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to compute dense attention without masks."""

    package: str
    """What to install."""
    module: str
    """What is then imported."""
    capabilities: tuple[int, int]
    """CUDA compute capabilities it runs on, by the first number, from and to."""
    head_dims: tuple[int, ...] | None
    """None: any multiple of 8 up to 256."""
    build: Callable[[ModuleType], Kernel]
    exact: bool = True
    """False: it rounds more than 16-bit attention does, so 'auto' does not take it."""


def _flash(module: ModuleType) -> Kernel:
    """flash-attn wants (B, tokens, heads, d); some of its releases also return the log-sum-exp."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = module.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _sage(module: ModuleType) -> Kernel:
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="HND", is_causal=False)


ENGINES: Mapping[str, Engine] = MappingProxyType({
    "flash3": Engine(package="flash-attn 3 (the hopper folder of its repository)", module="flash_attn_interface",
                     capabilities=(9, 9), head_dims=None, build=_flash),
    "flash": Engine(package="flash-attn", module="flash_attn", capabilities=(8, 99), head_dims=None, build=_flash),
    "sage": Engine(package="sageattention", module="sageattention", capabilities=(8, 99), head_dims=(64, 96, 128),
                   build=_sage, exact=False),
})  # fmt: skip
"""By name, the first that works is what 'auto' takes; below them all is 'sdpa', PyTorch's own."""
ENGINE_NAMES = ("auto", "sdpa", "flash", "flash3", "sage")


@dataclass(frozen=True, kw_only=True)
class ChosenEngine:
    """An engine ready to call, and how to name it."""

    name: str
    attend: AttentionFn
    told: str
    """For the output, such as 'sdpa (flash: not installed)'."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What one device has."""

    device: torch.device
    kernels: Mapping[str, Kernel]
    """Engines that work here, by name; without 'sdpa', which always does."""
    problems: Mapping[str, str]
    """Why the others do not."""

    def choose(self, name: str, *, head_dim: int, dtype: torch.dtype) -> ChosenEngine:
        """The engine called `name`, or for 'auto' the fastest exact one that fits.

        Raises:
            ValueError: it is unknown, not installed, or not for this device, dtype or head size.
        """
        if name not in ENGINE_NAMES:
            raise ValueError(f"attention engine '{name}' is unknown; use one of {', '.join(ENGINE_NAMES)}")
        problems = {entry: self._problem(entry, head_dim, dtype) for entry in ENGINES}
        if name == "auto":
            usable = [entry for entry, engine in ENGINES.items() if engine.exact and problems[entry] is None]
            chosen = usable[0] if usable else "sdpa"
            better = list(ENGINES)[: list(ENGINES).index(chosen)] if usable else list(ENGINES)
            passed = [f"{entry}: {problems[entry]}" for entry in better if problems[entry] and ENGINES[entry].exact]
            return self._made(chosen, f"{chosen} ({'; '.join(passed)})" if passed else chosen)
        if name != "sdpa" and problems[name]:
            raise ValueError(
                f"attention engine '{name}' cannot be used: {problems[name]} (package: {ENGINES[name].package}); "
                "use engine auto or sdpa"
            )
        return self._made(name, name)

    def _problem(self, name: str, head_dim: int, dtype: torch.dtype) -> str | None:
        if name in self.problems:
            return self.problems[name]
        if dtype not in (torch.float16, torch.bfloat16):
            return f"needs fp16 or bf16, not {str(dtype).removeprefix('torch.')}"
        sizes = ENGINES[name].head_dims
        if head_dim not in sizes if sizes else head_dim % 8 or head_dim > 256:
            return f"has no kernel for heads of {head_dim}"
        return None

    def _made(self, name: str, told: str) -> ChosenEngine:
        attend = dense_attention if name == "sdpa" else masks_by_sdpa(self.kernels[name])
        return ChosenEngine(name=name, attend=attend, told=told)


def masks_by_sdpa(kernel: Kernel) -> AttentionFn:
    """The engines know no key masks: attention to padded text stays with PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return kernel(q, k, v) if key_mask is None else dense_attention(q, k, v, key_mask)

    return attend


def probe_engines(device: torch.device | str = "cpu") -> Engines:
    """Find out which engines work on `device`: they are imported there and compared with PyTorch on a few tokens."""
    device = torch.device(device)
    kernels: dict[str, Kernel] = {}
    problems: dict[str, str] = {}
    for name, engine in ENGINES.items():
        try:
            kernels[name] = _probed(engine, device)
        except _Unusable as problem:
            problems[name] = str(problem)
    return Engines(device=device, kernels=MappingProxyType(kernels), problems=MappingProxyType(problems))


class _Unusable(Exception):  # noqa: N818
    """An engine does not work here; the message is short and says why."""


def _probed(engine: Engine, device: torch.device) -> Kernel:
    if device.type != "cuda":
        raise _Unusable(f"needs CUDA, not {device.type}")
    if importlib.util.find_spec(engine.module) is None:
        raise _Unusable("not installed")
    major, _ = torch.cuda.get_device_capability(device)
    if not engine.capabilities[0] <= major <= engine.capabilities[1]:
        raise _Unusable(f"not made for compute capability {major}")
    try:
        kernel = engine.build(importlib.import_module(engine.module))
        error = probe_error(kernel, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # Compiled packages fail with every kind of exception.
        lines = str(problem).strip().splitlines() or ["no message"]
        raise _Unusable(f"installed, but fails: {type(problem).__name__}: {lines[0]}") from problem
    if not error < PROBE_ERROR:
        raise _Unusable(f"installed, but wrong by {error:.2g} on a few tokens")
    return kernel


@torch.no_grad()
def probe_error(kernel: Kernel, device: torch.device | str) -> float:
    """Largest difference of `kernel` to PyTorch on 256 random tokens of two heads of 64, in bf16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    found, expected = kernel(q, k, v), dense_attention(q, k, v)
    return float((found.float() - expected.float()).abs().max())
