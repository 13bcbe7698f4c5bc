"""What the stages of `benchmarks/gpu.py` measure, and what they share. All weights are random, at full width."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from kandinsky5_core.attention.engines import ChosenEngine, probe_engines
from kandinsky5_core.bench import subjects
from kandinsky5_core.bench.machine import matmul
from kandinsky5_core.bench.peak import peak_of
from kandinsky5_core.bench.timing import alternate, synchronise
from kandinsky5_core.bench.work import dit_flops
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import DiTConfig, Variant, variant
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.dit.plan import VisualPlan, plan_visual
from kandinsky5_core.memory import activations
from kandinsky5_core.shapes import VideoShape

from .notes import Notes

TIMESTEP, GIB = 500.0, 2**30
OURS, COMPILED = "ours", "ours, compiled"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured, and how often."""

    video: str = "lite-t2v-5s-sft"
    long: str = "lite-t2v-10s-sft"
    pro: str = "pro-t2v-5s-sft"
    image: str = "image-lite-t2i-sft"
    short_size: tuple[int, int, int] = (121, 512, 768)
    long_size: tuple[int, int, int] = (241, 512, 768)
    image_size: tuple[int, int, int] = (1, 1024, 1024)
    vae_size: tuple[int, int, int] = (121, 512, 768)
    vae_budgets: tuple[float, ...] = (16, 4)
    """GiB."""
    sparsity: float = 0.9
    text_tokens: int = 128
    text_layers: int = 28
    attention: tuple[int, int, int] = (28, 47_616, 64)
    """Heads, tokens and head size of the engines that are measured side by side."""
    swaps: tuple[int, ...] = (0, 16, 32)
    repeats: int = 3
    long_repeats: int = 2
    """Of steps of several seconds."""
    blocks: int | None = None
    """Visual blocks; None: all."""
    backend: str = "inductor"
    """Of torch.compile."""


FULL = Sizes()
TINY = Sizes(
    video="nano-video", long="nano-video", pro="nano-video", image="nano-image", short_size=(5, 64, 64),
    # Not whole token blocks, so that nothing is compiled for NABLA on a CPU.
    long_size=(5, 368, 368), image_size=(1, 64, 64), vae_size=(9, 64, 64), vae_budgets=(0.05, 0.02), sparsity=0.3,
    text_tokens=8, text_layers=1, attention=(2, 256, 32), swaps=(0, 1, 2), repeats=1, long_repeats=1,
    blocks=2, backend="aot_eager",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """Where a stage runs, and what it measures."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    tiny: bool = False


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A DiT with random weights, and one evaluation's inputs."""

    row: Variant
    config: DiTConfig
    dit: DiffusionTransformer
    grid: tuple[int, int, int]
    latents: Tensor
    timestep: Tensor
    text: TextConditioning
    engine: ChosenEngine
    plan: VisualPlan
    """Dense."""

    def step(self, dit: DiffusionTransformer | None = None, plan: VisualPlan | None = None) -> Callable[[], Tensor]:
        """One evaluation of `dit`, else of the own one."""
        return partial(dit or self.dit, self.latents, self.timestep, self.text, plan or self.plan)


def subject_of(given: Given, notes: Notes, name: str, size: tuple[int, int, int]) -> Subject:
    """The variant at full depth, with the fastest exact engine; where that fails at this size, that is an error, and
    PyTorch's own is measured.
    """
    row, (frames, height, width) = variant(name), size
    config = subjects.fewer_blocks(row.dit, given.sizes.blocks)
    latent_shape = VideoShape(1, frames, height, width).latent_shape(row.vae)
    grid = latent_shape.token_grid(config.patch_size)
    engine = engine_of(given, notes, config, prod(grid))
    channels = latent_shape._replace(channels=config.input_channels)
    return Subject(
        row=row, config=config, dit=subjects.random_dit(config, given.device, given.dtype), grid=grid,
        latents=subjects.random_latents(channels, given.device, given.dtype),
        timestep=torch.full((1,), TIMESTEP, device=given.device),
        text=subjects.random_text(config, given.sizes.text_tokens, given.device, given.dtype), engine=engine,
        plan=plan_visual(config, grid, row.rope_scale, None, given.device, engine.attend),
    )  # fmt: skip


def engine_of(given: Given, notes: Notes, config: DiTConfig, tokens: int) -> ChosenEngine:
    """The engine that 'auto' takes, tried on as many tokens as it will see; else 'sdpa'."""
    engines, sizes = probe_engines(given.device), {"head_dim": config.head_dim, "dtype": given.dtype}
    chosen = engines.choose("auto", **sizes)
    shape = (1, tokens, config.num_heads, config.head_dim)

    def tried() -> bool:
        q = torch.ones(shape, device=given.device, dtype=given.dtype).transpose(1, 2)
        chosen.attend(q, q, q)
        synchronise(given.device)
        return True

    return chosen if notes.attempt(f"engine {chosen.name}", tried) else engines.choose("sdpa", **sizes)


def size_of(size: tuple[int, int, int]) -> str:
    """Such as '512x768x121'."""
    frames, height, width = size
    return f"{height}x{width}x{frames}"


def clear(device: torch.device) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Of the card; None where it is not asked."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def measure_steps(
    given: Given, notes: Notes, table: str, steps: Mapping[str, Callable[[], Tensor]], work: Subject,
    kept: Mapping[str, float] | None = None, repeats: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Time them in turns and note a row for each; seconds by name.

    Args:
        kept: Share of the attention that a step computes, where it is not all.
        repeats: Default that of the sizes.
    """
    multiply, matmul_flops = matmul(work.config, given.device, given.dtype)
    kept = kept or {}
    samples = alternate({**steps, "matmul": multiply}, given.device, repeats=repeats or given.sizes.repeats)
    rate = matmul_flops / samples["matmul"].median
    for name in steps:
        flops = dit_flops(work.config, work.grid, given.sizes.text_tokens, kept=kept.get(name, 1.0))
        seconds = samples[name].median
        notes.row(table, {
            "what": name, "seconds": seconds, "best": min(samples[name].seconds), "tokens/s": prod(work.grid) / seconds,
            "of matmul": flops / seconds / rate,
        })  # fmt: skip
    notes.fact("matmul_tflops", rate / 1e12)
    return {name: samples[name].median for name in steps}


def note_peak(given: Given, notes: Notes, what: str, work: Callable[[], object], predicted: int) -> None:
    """The peak of a step that has run before, beside the planner's number for it."""
    if given.device.type != "cuda":
        notes.skip(f"peak of {what}", "the planner's prediction is of a card's memory")
        work()
        return
    peak = peak_of(work, given.device)
    notes.row("peak memory", {
        "what": what, "predicted GiB": predicted / GIB, "measured GiB": peak["added_bytes"] / GIB,
        "ratio": predicted / peak["added_bytes"], "all on the card GiB": peak["peak_bytes"] / GIB,
    })  # fmt: skip
    notes.fact(f"planned_ratio_{what}", predicted / peak["added_bytes"])


def dit_planned(given: Given, work: Subject, *, nabla: bool = False) -> int:
    """The planner's bytes of one evaluation."""
    tokens = prod(work.grid)
    return activations.dit_bytes(
        work.config, tokens, given.dtype.itemsize, text_tokens=given.sizes.text_tokens, nabla=nabla
    )
