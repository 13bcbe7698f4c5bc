"""The stages that `kandinsky5 bench` measures, each as a `Case`: what to run, beside what, and how much work it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..attention.engines import ChosenEngine
from ..attention.nabla import NablaAttention, resolve_attention
from ..config import DiTConfig, NablaConfig, Variant
from ..dit.model import DiffusionTransformer
from ..dit.plan import VisualPlan, plan_visual
from ..memory.apply import compile_blocks
from ..shapes import VideoShape
from ..text.encoder import TextEncoder
from ..vae.pass_plan import describe, plan_pass
from ..vae.tile_plan import DEFAULT_BUDGET_BYTES
from ..vae.within import decode_within, encode_within
from ..weights.load import load_dit, load_vae
from ..weights.modules import build_on_meta
from . import rivals, subjects
from .nabla import nabla_cases
from .sparsity import Found, check_sparsity, found_mass, measured_shares
from .work import dit_flops

STAGES = ("text", "dit", "vae_encode", "vae_decode", "load", "attention")
TIMESTEP = 500.0
PAGE = 4096
PROMPT = "a big red circle moves left on a black background"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    variant: Variant
    config: DiTConfig
    """The variant's, with fewer blocks where that was asked for."""
    shapes: tuple[VideoShape, ...]
    device: torch.device
    dtype: torch.dtype
    engine: ChosenEngine
    attention: str = "auto"
    text_tokens: int = 128
    text_layers: int = 28
    compiled: bool = False
    against: str | None = None
    compile_rival: bool = False
    """Theirs compiled as well, beside theirs as it is."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """'dit' and 'vae': weights to measure with instead of random ones."""
    attention_tokens: tuple[int, ...] = (4096, 16_384)
    attention_heads: int = 4
    sparsity: float = 0.9
    """Share of the token blocks that NABLA drops, where its mass is not that of given weights."""
    text_encoder: TextEncoder | None = None
    """Of an embedded model, to measure instead of Qwen2.5-VL 7B's sizes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure."""

    stage: str
    what: str
    run: Callable[[], object]
    beside: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    """By name: the same work done by others."""
    same_output: bool = True
    """The outputs are compared and their difference is reported."""
    tokens: int = 0
    flops: int = 0
    note: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


def cases(stage: str, plan: Plan) -> Iterator[Case]:
    """The cases of a stage, each made when it is its turn.

    Raises:
        ValueError: no such stage.
    """
    makers = {
        "text": text_cases, "dit": dit_cases, "vae_encode": partial(vae_cases, "vae_encode"),
        "vae_decode": partial(vae_cases, "vae_decode"), "load": load_cases,
        "attention": lambda given: nabla_cases(given, Case),
    }  # fmt: skip
    if stage not in makers:
        raise ValueError(f"--stage '{stage}' is unknown; use {', '.join(STAGES)}")
    return makers[stage](plan)


def blocks_note(plan: Plan) -> str:
    """Which part of the model is measured."""
    full, used = plan.variant.dit.num_visual_blocks, plan.config.num_visual_blocks
    weights = "weights of the file" if "dit" in plan.files else "random weights"
    return f"{used} of {full} visual blocks, {weights}" if used < full else f"all {full} visual blocks, {weights}"


def the_dit(plan: Plan) -> DiffusionTransformer:
    """The model to measure."""
    if "dit" not in plan.files:
        return subjects.random_dit(plan.config, plan.device, plan.dtype)
    dit, _ = load_dit(plan.files["dit"], dtype=plan.dtype)
    dit.visual_transformer_blocks = dit.visual_transformer_blocks[: plan.config.num_visual_blocks]
    dit.config = plan.config
    return dit.to(plan.device).eval().requires_grad_(False)


def dit_cases(plan: Plan) -> Iterator[Case]:
    """One evaluation of the DiT for each size; under NABLA beside our own dense one.

    Raises:
        ValueError: a sparsity that NABLA cannot have at one of the sizes.
    """
    nabla = resolve_attention(plan.attention, plan.variant.nabla)
    grids = [shape.latent_shape(plan.variant.vae).token_grid(plan.config.patch_size) for shape in plan.shapes]
    for grid in grids if nabla is not None and "dit" not in plan.files else ():
        check_sparsity(plan.sparsity, grid, nabla)
    dit = plain = the_dit(plan)
    if plan.compiled:
        plain = same_tensors(dit)
        compile_blocks(dit)
    theirs = rivals.Contenders(plain, compiled=plan.compile_rival) if plan.against else None
    text = subjects.random_text(plan.config, plan.text_tokens, plan.device, plan.dtype)
    timestep = torch.tensor([TIMESTEP], device=plan.device)
    for shape, grid in zip(plan.shapes, grids, strict=True):
        channels = shape.latent_shape(plan.variant.vae)._replace(channels=plan.config.input_channels)
        latents = subjects.random_latents(channels, plan.device, plan.dtype)
        scale = plan.variant.rope_scale
        visual = plan_visual(plan.config, grid, scale, None, plan.device, plan.engine.attend)
        facts: dict[str, object] = {
            "text_tokens": plan.text_tokens, "attention": "dense" if nabla is None else "nabla",
            "engine": plan.engine.told, "compiled": plan.compiled,
        }  # fmt: skip
        beside: dict[str, Callable[[], object]] = {}
        kept = 1.0
        if nabla is not None:
            beside[f"dense {plan.engine.name}"] = partial(dit, latents, timestep, text, visual)
            visual, found = _sparse(plan, plain, nabla, grid, partial(plain, latents, timestep, text))
            facts |= found.facts()
            kept = 1 - found.mean
        if plan.compiled:
            beside["ours, not compiled"] = partial(plain, latents, timestep, text, visual)
        if theirs is not None:
            steps, told = theirs.steps(latents, timestep, text, grid, scale)
            beside |= steps
            facts["diffusers_backends"] = told
        yield Case(
            stage="dit", what=size_name(shape), run=partial(dit, latents, timestep, text, visual), beside=beside,
            tokens=prod(grid), flops=dit_flops(plan.config, grid, plan.text_tokens, kept=kept),
            same_output=nabla is None, note=blocks_note(plan), facts=facts,
        )  # fmt: skip


def _sparse(
    plan: Plan, dit: DiffusionTransformer, nabla: NablaConfig, grid: tuple[int, int, int],
    step: Callable[[VisualPlan], object],
) -> tuple[VisualPlan, Found]:  # fmt: skip
    """The plan under NABLA: of given weights with the mass they were trained with, of random ones with that found.

    What it drops is measured in `step`.
    """

    def with_attention(attention: NablaAttention) -> object:
        return step(replace(visual, nabla=attention))

    visual = plan_visual(dit.config, grid, plan.variant.rope_scale, nabla, plan.device, plan.engine.attend)
    with torch.inference_mode():
        if "dit" in plan.files:
            return visual, measured_shares(with_attention, nabla, grid, plan.device)[0]
        found = found_mass(with_attention, nabla, plan.sparsity, grid, plan.device, plan.engine.attend)
    sparse = NablaAttention(found.config, grid, device=plan.device)
    return replace(visual, nabla=sparse), found


def same_tensors(dit: DiffusionTransformer) -> DiffusionTransformer:
    """A second model over the very tensors of `dit`."""
    other = build_on_meta(lambda: DiffusionTransformer(dit.config))
    other.load_state_dict(dit.state_dict(), strict=True, assign=True)
    return other.eval().requires_grad_(False)


def text_cases(plan: Plan) -> Iterator[Case]:
    """The language model that reads the prompt; of an embedded model the whole text encoder."""
    if plan.text_encoder is not None:
        plan.text_encoder.to(plan.device)
        read = partial(
            plan.text_encoder.encode, [PROMPT], task=plan.variant.tasks[0], max_tokens=plan.variant.max_text_tokens
        )
        words = int(read().mask.sum())
        yield Case(stage="text", what=f"{words} tokens", tokens=words, note="weights of the file", run=read)
        return
    qwen = subjects.random_qwen(plan.text_layers, plan.device, plan.dtype)
    words = torch.arange(plan.text_tokens, device=plan.device)[None]
    weights = sum(parameter.numel() for name, parameter in qwen.named_parameters() if "embed" not in name)

    def hidden_states() -> Tensor:
        return qwen(input_ids=words, use_cache=False).last_hidden_state

    total = subjects.QWEN["num_hidden_layers"]
    yield Case(
        stage="text", what=f"{plan.text_tokens} tokens", run=hidden_states, tokens=plan.text_tokens,
        flops=2 * weights * plan.text_tokens, note=f"{plan.text_layers} of {total} layers, random weights",
    )  # fmt: skip


def vae_cases(stage: str, plan: Plan) -> Iterator[Case]:
    """Encoding or decoding each size within the default memory budget."""
    config = plan.variant.vae
    if "vae" in plan.files:
        vae = load_vae(plan.files["vae"], dtype=plan.dtype)[0].to(plan.device).eval().requires_grad_(False)
    else:
        vae = subjects.random_vae(config, plan.device, plan.dtype)
    theirs = rivals.diffusers_vae(vae) if plan.against else None
    for shape in plan.shapes:
        latent_shape = shape.latent_shape(config)
        way = plan_pass(
            latent_shape, config, direction=stage.removeprefix("vae_"), budget_bytes=DEFAULT_BUDGET_BYTES,
            bytes_per_element=plan.dtype.itemsize,
        )  # fmt: skip
        pixels_shape = (shape.batch, 3, shape.frames, shape.height, shape.width)
        beside: dict[str, Callable[[], object]] = {}
        if stage == "vae_decode":
            given = subjects.random_latents(latent_shape, plan.device, plan.dtype)
            run = partial(decode_within, vae, given, DEFAULT_BUDGET_BYTES)
            call = partial(theirs.decode, return_dict=False) if theirs else None
        else:
            given = subjects.random_latents(pixels_shape, plan.device, plan.dtype).clamp(-1, 1)
            run = partial(encode_within, vae, given, DEFAULT_BUDGET_BYTES)
            call = partial(theirs.encode, return_dict=False) if theirs else None
        if call is not None:
            flat = config.kind == "flux"
            beside["diffusers"] = partial(call, given[:, :, 0] if flat else given)
        yield Case(
            stage=stage, what=size_name(shape), run=run, beside=beside, tokens=prod(latent_shape[2:]),
            same_output=False, note="weights of the file" if "vae" in plan.files else "random weights",
            facts={"way": describe(way, latent_shape, config)},
        )  # fmt: skip


def load_cases(plan: Plan) -> Iterator[Case]:
    """File to device, with the file in the page cache, beside reading its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = plan.files.get("dit")
        if path is None:
            path = Path(folder) / "dit.safetensors"
            # Made where random numbers are quick.
            write_dit(subjects.random_dit(plan.config, plan.device, plan.dtype).to("cpu"), path)
        parts = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        num_bytes = sum(part.stat().st_size for part in parts)
        buffer = bytearray(max(part.stat().st_size for part in parts))
        yield Case(
            stage="load", what=f"{num_bytes / 2**30:.2f} GiB", run=partial(load_and_touch, path, plan),
            beside={"read the bytes": partial(read_into, parts, buffer)}, same_output=False, note=blocks_note(plan),
            facts={"bytes": num_bytes},
        )  # fmt: skip


def write_dit(dit: DiffusionTransformer, path: Path) -> None:
    """A file of these weights."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in dit.state_dict().items()}, path)


def load_and_touch(path: Path, plan: Plan) -> None:
    """Load, and look at every page of memory: a mapped file is read only then."""
    dit, _ = load_dit(path, dtype=plan.dtype, device=plan.device)
    for parameter in dit.parameters():
        parameter.detach().flatten()[:: PAGE // plan.dtype.itemsize].sum()


def read_into(paths: list[Path], buffer: bytearray) -> None:
    """Read files one after the other into memory that is there already."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(buffer), 0
            while count := file.readinto(view[done:]):
                done += count


def size_name(shape: VideoShape) -> str:
    """Such as '512x768, 121 frames', height first."""
    return f"{shape.height}x{shape.width}, {shape.frames} frame{'s' if shape.frames > 1 else ''}"
