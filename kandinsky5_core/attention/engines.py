"""The engines that can compute dense attention: which are here, probed once for a device, and chosen by name.

Nothing is kept between calls: `probe_engines` makes a small frozen object, and who made it hands it on. What has to be
compiled first is compiled and compared only when it is chosen by name.
Shape legend: B batch, N queries, M keys, d head_dim; engines take and give (B, heads, tokens, d).
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from .dense import AttentionFn, dense_attention
from .flex import compiled_dense_flex

PROBE_ERROR = 0.1
"""How far an engine may be from PyTorch on random numbers; a broken kernel is further away."""
PROBE_HEAD = 64
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


HALF = (torch.float16, torch.bfloat16)


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
    auto_from: int | None
    """The compute capability from which 'auto' takes it; None: never, only by name."""
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = HALF
    compiled: bool = False
    """It is compiled, which takes seconds to a minute: not before it is chosen."""


def _flash(module: ModuleType) -> Kernel:
    """flash-attn wants (B, tokens, heads, d); some of its releases also return the log-sum-exp."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = module.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def _sage(module: ModuleType) -> Kernel:
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _cudnn(module: ModuleType) -> Kernel:
    """PyTorch's own call with cuDNN as the only backend: where that has no kernel, it fails instead of falling back."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with module.sdpa_kernel(module.SDPBackend.CUDNN_ATTENTION):
            return dense_attention(q, k, v)

    return attend


# Fastest first, as far as 'auto' may take them. On Hopper FlashAttention 3 and cuDNN are written for the card's own
# instructions and are about level; FlashAttention 2 runs there too, at little more than half their published rate. On
# Ampere and Ada cuDNN has no such lead and plans each size anew, so there 'auto' keeps to flash; by name it can be had.
# PyTorch's own choice comes last: which backend it prefers changes from release to release.
ENGINES: Mapping[str, Engine] = MappingProxyType({
    "flash3": Engine(package="flash-attn 3 (the hopper folder of its repository)", module="flash_attn_interface",
                     capabilities=(9, 9), head_dims=None, build=_flash, auto_from=9),
    "cudnn": Engine(package="torch for CUDA, with cuDNN", module="torch.nn.attention", capabilities=(8, 99),
                    head_dims=tuple(range(8, 129, 8)), build=_cudnn, auto_from=9),
    "flash": Engine(package="flash-attn", module="flash_attn", capabilities=(8, 99), head_dims=None, build=_flash,
                    auto_from=8),
    # It rounds queries and keys to eight bits, more than 16-bit attention does.
    "sage": Engine(package="sageattention", module="sageattention", capabilities=(8, 99), head_dims=(64, 96, 128),
                   build=_sage, auto_from=None),
    # Made for masks: without one it is no faster than the others, and it has to be compiled.
    "flex": Engine(package="torch, with a compiler", module="torch.nn.attention.flex_attention", capabilities=(7, 99),
                   head_dims=None, build=lambda _: compiled_dense_flex, auto_from=None, devices=("cuda", "cpu"),
                   dtypes=(*HALF, torch.float32), compiled=True),
})  # fmt: skip
"""By name, the first that works is what 'auto' takes; below them all is 'sdpa', PyTorch's own."""
ENGINE_NAMES = ("auto", "sdpa", *ENGINES)


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
    """Engines that work here, by name; without 'sdpa', which always does, and without those to be compiled first."""
    problems: Mapping[str, str]
    """Why the others do not."""
    capability: int = 0
    """CUDA compute capability, its first number; 0 on other devices."""

    def choose(self, name: str, *, head_dim: int, dtype: torch.dtype) -> ChosenEngine:
        """The engine called `name`, or for 'auto' the fastest exact one that fits.

        Raises:
            ValueError: it is unknown, not installed, or not for this device, dtype or head size.
        """
        if name not in ENGINE_NAMES:
            raise ValueError(f"attention engine '{name}' is unknown; use one of {', '.join(ENGINE_NAMES)}")
        if name == "auto":
            return self._fastest(head_dim, dtype)
        if name == "sdpa":
            return ChosenEngine(name=name, attend=dense_attention, told=name)
        problem = self._problem(name, head_dim, dtype)
        try:
            if problem is None:
                kernel = self.kernels.get(name) or _probed(ENGINES[name], self.device, head_dim=head_dim, dtype=dtype)
                return ChosenEngine(name=name, attend=masks_by_sdpa(kernel), told=name)
        except _Unusable as found:
            problem = str(found)
        raise ValueError(
            f"attention engine '{name}' cannot be used: {problem} (package: {ENGINES[name].package}); "
            "use engine auto or sdpa"
        )

    def _fastest(self, head_dim: int, dtype: torch.dtype) -> ChosenEngine:
        """The first that 'auto' may take, or PyTorch's; what was passed over is told with the reason."""
        passed = []
        for name, engine in ENGINES.items():
            if engine.auto_from is None:
                continue
            problem = self._problem(name, head_dim, dtype)
            if problem is None and self.capability < engine.auto_from:
                problem = f"taken by itself from compute capability {engine.auto_from} on"
            if problem is None:
                problem = self._refused(name, head_dim, dtype)
            if problem is None:
                told = f"{name} ({'; '.join(passed)})" if passed else name
                return ChosenEngine(name=name, attend=masks_by_sdpa(self.kernels[name]), told=told)
            passed.append(f"{name}: {problem}")
        return ChosenEngine(name="sdpa", attend=dense_attention, told=f"sdpa ({'; '.join(passed)})")

    def _refused(self, name: str, head_dim: int, dtype: torch.dtype) -> str | None:
        """Why it does not work with the heads that it is wanted for; what was probed before had heads of 64 in bf16."""
        if (head_dim, dtype) == (PROBE_HEAD, torch.bfloat16):
            return None
        try:
            _probed(ENGINES[name], self.device, head_dim=head_dim, dtype=dtype)
        except _Unusable as found:
            return str(found)
        return None

    def _problem(self, name: str, head_dim: int, dtype: torch.dtype) -> str | None:
        if name in self.problems:
            return self.problems[name]
        engine = ENGINES[name]
        if dtype not in engine.dtypes:
            kinds = "fp16 or bf16" if engine.dtypes == HALF else "fp16, bf16 or fp32"
            return f"needs {kinds}, not {str(dtype).removeprefix('torch.')}"
        sizes = engine.head_dims
        if head_dim not in sizes if sizes else head_dim % 8 or head_dim > 256:
            return f"has no kernel for heads of {head_dim}"
        return None


def masks_by_sdpa(kernel: Kernel) -> AttentionFn:
    """The engines know no key masks: attention to padded text stays with PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return kernel(q, k, v) if key_mask is None else dense_attention(q, k, v, key_mask)

    return attend


def probe_engines(device: torch.device | str = "cpu") -> Engines:
    """Find out which engines work on `device`: they are imported there and compared with PyTorch on a few tokens.

    Those that are compiled first are only looked for.
    """
    device = torch.device(device)
    kernels: dict[str, Kernel] = {}
    problems: dict[str, str] = {}
    for name, engine in ENGINES.items():
        try:
            _check_found(engine, device)
            if not engine.compiled:
                kernels[name] = _probed(engine, device)
        except _Unusable as problem:
            problems[name] = str(problem)
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return Engines(
        device=device, kernels=MappingProxyType(kernels), problems=MappingProxyType(problems), capability=capability
    )


class _Unusable(Exception):  # noqa: N818
    """An engine does not work here; the message is short and says why."""


def _check_found(engine: Engine, device: torch.device) -> None:
    if device.type not in engine.devices:
        raise _Unusable(f"needs {' or '.join(engine.devices).replace('cuda', 'CUDA')}, not {device.type}")
    if importlib.util.find_spec(engine.module) is None:
        raise _Unusable("not installed")
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if not engine.capabilities[0] <= major <= engine.capabilities[1]:
            raise _Unusable(f"not made for compute capability {major}")


def _probed(
    engine: Engine, device: torch.device, *, head_dim: int = PROBE_HEAD, dtype: torch.dtype = torch.bfloat16
) -> Kernel:
    with warnings.catch_warnings(record=True) as said:  # PyTorch warns of why a backend refuses, and raises without.
        warnings.simplefilter("always")
        try:
            kernel = engine.build(importlib.import_module(engine.module))
            error = probe_error(kernel, device, head_dim=head_dim, dtype=dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # Compiled packages and compilers fail with every kind of exception.
            lines = str(problem).strip().splitlines() or ["no message"]
            reasons = [str(warning.message).splitlines()[0] for warning in said if str(warning.message).strip()]
            told = "; ".join([f"{type(problem).__name__}: {lines[0]}", *reasons[:3]])
            raise _Unusable(f"installed, but fails: {told}") from problem
    if not error < PROBE_ERROR:
        raise _Unusable(f"installed, but wrong by {error:.2g} on a few tokens")
    return kernel


@torch.no_grad()
def probe_error(
    kernel: Kernel, device: torch.device | str, *, head_dim: int = PROBE_HEAD, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Largest difference of `kernel` to PyTorch on 256 random tokens of two heads, which lie as the DiT's do."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 256, 2, head_dim, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)
    )
    found, expected = kernel(q, k, v), dense_attention(q, k, v)
    return float((found.float() - expected.float()).abs().max())
