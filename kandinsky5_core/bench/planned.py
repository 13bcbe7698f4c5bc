"""The planner's arithmetic beside what is measured: bytes of live tensors, which are the same on every run.

Random weights at full width with few blocks, and the embedded Nano models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.block_mask import kept_blocks
from ..attention.nabla import NablaAttention
from ..conditioning import TextConditioning
from ..config import DiTConfig, NablaConfig, Variant, variant
from ..dit.model import DiffusionTransformer
from ..dit.plan import plan_visual
from ..dit.rope import Rope
from ..loading import load
from ..memory import activations, parameters
from ..memory.estimate import default_job
from ..memory.options import AS_IS
from ..shapes import VideoShape
from ..vae.flux import FluxVAE
from ..vae.hunyuan.model import HunyuanVAE
from ..vae.within import decode_within, encode_within
from . import rivals, subjects
from .live import live_peak
from .peak import peak_of

Measure = Callable[[Callable[[], object]], int]
CPU, META = torch.device("cpu"), torch.device("meta")
GATHER = "gather"
FULL_SIZES = (
    "lite-t2v-5s-sft", "lite-t2v-10s-sft", "pro-t2v-5s-sft", "pro-t2v-10s-sft", "pro-t2v-5s-sft-hd",
    "pro-t2v-10s-sft-hd", "image-lite-t2i-sft", "image-lite-i2i-sft",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One prediction and what was measured."""

    stage: str
    what: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def process_peak(work: Callable[[], object]) -> int:
    """Most bytes that `work` adds to this process, the room that kernels take included; it runs twice."""
    work()
    peaks = peak_of(work, CPU)
    if peaks["added_bytes"] is None:
        raise ValueError("this system does not tell the peak of a piece of work; measure on Linux")
    return peaks["added_bytes"]


def dit_step(
    name: str, shape: VideoShape, *, dtype: torch.dtype, blocks: int = 2, text_tokens: int = 64,
    measure: Measure = live_peak,
) -> Compared:  # fmt: skip
    """One evaluation of the DiT, its inputs not counted."""
    row = variant(name)
    config = replace(row.dit, num_visual_blocks=min(blocks, row.dit.num_visual_blocks), num_text_blocks=1)
    latent_shape = shape.latent_shape(row.vae)
    grid = latent_shape.token_grid(config.patch_size)
    plan = plan_visual(config, grid, row.rope_scale)
    if row.nabla is not None:
        # FlexAttention's compiler does not let its tensors be counted.
        sparse = NablaAttention(row.nabla, grid, path=GATHER)
        plan = replace(plan_visual(config, grid, row.rope_scale, row.nabla), nabla=sparse)
    dit = subjects.random_dit(config, CPU, dtype)
    text = subjects.random_text(config, text_tokens, CPU, dtype).repeat(shape.batch)
    latents = subjects.random_latents(latent_shape._replace(channels=config.input_channels), CPU, dtype)
    timestep = torch.full((shape.batch,), 500.0)
    with torch.no_grad():
        measured = measure(lambda: dit(latents, timestep, text, plan))
    num_tokens = grid[0] * grid[1] * grid[2] if plan.nabla is None else len(plan.nabla.tokens.order)
    predicted = activations.dit_bytes(
        config, num_tokens, dtype.itemsize, batch=shape.batch, text_tokens=text_tokens, nabla=row.nabla is not None,
        on_cpu=True,
    )  # fmt: skip
    what = f"{name}, {config.num_visual_blocks} blocks, {_shape(shape)}, {text_tokens} text tokens, {_name(dtype)}"
    return Compared(stage="dit", what=what, predicted=predicted, measured=measured)


@contextmanager
def one_kernel_each() -> Iterator[None]:
    """Attention and RMS norms keep nothing but their result, as on CUDA; without data PyTorch takes both apart."""
    attend, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = lambda query, *_, **__: torch.empty_like(query)
    F.rms_norm = lambda x, *_, **__: torch.empty_like(x)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attend, norm


class SizedNabla(NablaAttention):
    """NABLA without data: its block mask and lists are made, and FlexAttention's result stands for its work."""

    def __init__(self, config: NablaConfig, grid: tuple[int, int, int]) -> None:
        super().__init__(config, grid)
        self.window = self.window.to(META)
        indices = {name: getattr(self.tokens, name) for name in ("order", "inverse", "token_mask")}
        self.tokens = replace(self.tokens, **{name: None if x is None else x.to(META) for name, x in indices.items()})

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        counts, indices = kept_blocks(self.block_mask(q, k))
        assert indices.shape[:-1] == counts.shape
        return torch.empty_like(q)


def without_data(config: DiTConfig, cells: tuple[int, ...], length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a DiT is given, latents of `cells` (T, h, w) and text of `length`, as tensors that take no memory."""
    with META:
        text = TextConditioning(
            embeds=torch.empty(1, length, config.in_text_dim, dtype=dtype), full=True,
            pooled=torch.empty(1, config.in_text_dim2, dtype=dtype), mask=torch.ones(1, length, dtype=torch.bool),
        )  # fmt: skip
        return torch.empty(1, config.input_channels, *cells, dtype=dtype), torch.empty(1), text


def full_step(name: str, *, blocks: int = 2, dtype: torch.dtype = torch.bfloat16) -> Compared:
    """One evaluation of the DiT at the size that the variant was made for, counted on tensors without data, with the
    steps that CUDA takes. A few blocks tell: activations of more do not add up."""
    job = default_job(variant(name))
    row, latent_shape = job.variant, job.shape.latent_shape(job.variant.vae)
    config = replace(row.dit, num_visual_blocks=blocks)
    grid, length = latent_shape.token_grid(config.patch_size), job.caption_tokens
    with META:
        dit = DiffusionTransformer(config).to(dtype).requires_grad_(False)
    given = without_data(config, latent_shape[2:], length, dtype)
    # Token blocks are found from data; the rest of the plan is only moved.
    plan = plan_visual(config, grid, row.rope_scale, row.nabla)
    nabla = None if row.nabla is None else SizedNabla(row.nabla, grid)
    plan = replace(plan, rope=Rope(*(part.to(META) for part in plan.rope)), nabla=nabla)
    with torch.no_grad(), one_kernel_each():
        measured = live_peak(lambda: dit(*given, plan))
    predicted = activations.dit_bytes(
        config, job.num_tokens, dtype.itemsize, text_tokens=length, nabla=row.nabla is not None
    )
    what = f"{name}, {blocks} blocks, {_shape(job.shape)}, {_name(dtype)}, without data"
    return Compared(stage="dit", what=what, predicted=predicted, measured=measured)


def full_step_of_diffusers(name: str, *, blocks: int = 2, dtype: torch.dtype = torch.bfloat16) -> int:
    """The bytes that `full_step` counts, of diffusers' class; dense."""
    job = default_job(variant(name))
    latent_shape = job.shape.latent_shape(job.variant.vae)
    config = replace(job.variant.dit, num_visual_blocks=blocks)
    with META:
        theirs = rivals.diffusers_dit(DiffusionTransformer(config).to(dtype))
    given = without_data(config, latent_shape[2:], job.caption_tokens, dtype)
    grid = latent_shape.token_grid(config.patch_size)
    step = rivals.diffusers_step(theirs, *given, grid, job.variant.rope_scale)
    with torch.no_grad(), one_kernel_each():
        return live_peak(step)


def full_vae(name: str, direction: str, *, budget: int, dtype: torch.dtype = torch.bfloat16) -> Compared:
    """A VAE pass at that size within a budget, counted on tensors without data."""
    job = default_job(variant(name))
    shape, config = job.shape, job.variant.vae
    with META:
        vae = (HunyuanVAE if config.kind == "hunyuan" else FluxVAE)(config).to(dtype).requires_grad_(False)
        pixels = (shape.batch, 3, *shape[1:])
        given = torch.empty(shape.latent_shape(config) if direction == "decode" else pixels, dtype=dtype)
    run, told = {"decode": decode_within, "encode": encode_within}[direction], {}
    with one_kernel_each():
        measured = live_peak(lambda: run(vae, given, budget, told=told))
    predicted = activations.vae_bytes(shape, config, direction, budget=budget, element_size=dtype.itemsize)
    way = str(told[f"vae_{direction}"]).split(":")[0]
    what = f"{name}, {_shape(shape)}, {_name(dtype)}, {budget / 2**30:g} GiB, without data: {way}"
    return Compared(stage=f"vae_{direction}", what=what, predicted=predicted, measured=measured)


def text_pass(num_tokens: int, *, layers: int, dtype: torch.dtype, measure: Measure = live_peak) -> Compared:
    """Qwen2.5-VL 7B's language model at full width."""
    qwen = subjects.random_qwen(layers, CPU, dtype)
    words = torch.arange(num_tokens)[None]
    with torch.no_grad():
        measured = measure(lambda: qwen(input_ids=words, use_cache=False).last_hidden_state)
    predicted = activations.text_bytes(parameters.TextSizes(), num_tokens, dtype.itemsize)
    what = f"Qwen2.5-VL 7B, {layers} layers, {num_tokens} tokens, {_name(dtype)}"
    return Compared(stage="text", what=what, predicted=predicted, measured=measured)


def vae_pass(
    name: str, shape: VideoShape, direction: str, *, dtype: torch.dtype, budget: int = 2**32,
    measure: Measure = live_peak,
) -> Compared:  # fmt: skip
    """Encoding or decoding within a budget; beside a process's peak with the room that the planner leaves kernels."""
    config = variant(name).vae
    vae = subjects.random_vae(config, CPU, dtype)
    pixels = (shape.batch, 3, shape.frames, shape.height, shape.width)
    given = subjects.random_latents(shape.latent_shape(config) if direction == "decode" else pixels, CPU, dtype)
    run, told = {"decode": decode_within, "encode": encode_within}[direction], {}
    measured = measure(lambda: run(vae, given, budget, told=told))
    predicted = activations.vae_bytes(shape, config, direction, budget=budget, element_size=dtype.itemsize)
    predicted = predicted if measure is live_peak else ceil(activations.WORKSPACE * predicted)
    way = str(told[f"vae_{direction}"]).split(":")[0]
    what = f"{config.kind} of {name}, {_shape(shape)}, {_name(dtype)}: {way}"
    return Compared(stage=f"vae_{direction}", what=what, predicted=predicted, measured=measured)


def loaded(name: str) -> Compared:
    """All weights of an embedded model in memory, in fp32."""
    models = load(name)
    networks = (models.dit, models.vae, models.text_encoder.qwen, models.text_encoder.clip)
    measured = sum(tensor.nbytes for network in networks for tensor in network.parameters())
    predicted = (
        parameters.dit(models.variant.dit).num_bytes(AS_IS, 4) + 4 * parameters.vae(models.variant.vae)
        + parameters.text_sizes(models.variant).num_bytes(AS_IS, 4)
    )  # fmt: skip
    return Compared(stage="load", what=f"{name}, fp32", predicted=predicted, measured=measured)


def block_weights(row: Variant, kind: str) -> Compared:
    """A visual block's weights, as torchao stores them in eight bits."""
    from ..memory.quantized import quantize_blocks

    config = replace(row.dit, num_visual_blocks=1, num_text_blocks=1)
    dit = subjects.random_dit(config, CPU, torch.bfloat16)
    if kind != AS_IS:
        quantize_blocks(dit, kind)
    measured = sum(_stored(parameter) for parameter in dit.parameters())
    predicted = parameters.dit(config).num_bytes(kind, 2)
    return Compared(stage="load", what=f"{row.name}, 1 block, {kind}", predicted=predicted, measured=measured)


def _stored(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, of a quantised one those of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_stored(getattr(tensor, name)) for name in names)


def every_case() -> Iterator[Compared]:
    """What `benchmarks/planner.py` shows."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype in (fp32, bf16):
        yield dit_step("nano-video", VideoShape(1, 17, 64, 64), dtype=dtype, blocks=5)
        yield dit_step("lite-t2v-5s-sft", VideoShape(1, 9, 256, 256), dtype=dtype, blocks=3)
    yield dit_step("lite-t2v-5s-sft", VideoShape(2, 9, 256, 256), dtype=bf16)
    yield dit_step("lite-t2v-5s-sft", VideoShape(1, 9, 256, 256), dtype=torch.float16)
    yield dit_step("lite-t2v-5s-sft", VideoShape(1, 5, 256, 256), dtype=fp32, text_tokens=256)
    yield dit_step("lite-t2v-10s-sft", VideoShape(1, 29, 256, 256), dtype=bf16)
    yield dit_step("pro-t2v-5s-sft", VideoShape(1, 5, 256, 256), dtype=bf16, blocks=1)
    yield dit_step("image-lite-t2i-sft", VideoShape(1, 1, 512, 512), dtype=bf16)
    for tokens, layers, dtype in ((128, 2, bf16), (256, 1, bf16), (128, 1, fp32)):
        yield text_pass(tokens, layers=layers, dtype=dtype)
    for direction in ("encode", "decode"):
        yield vae_pass("nano-video", VideoShape(1, 17, 64, 64), direction, dtype=fp32)
        yield vae_pass("nano-image", VideoShape(1, 1, 96, 96), direction, dtype=fp32)
        yield vae_pass("lite-t2v-5s-sft", VideoShape(1, 9, 64, 96), direction, dtype=bf16)
        yield vae_pass("lite-t2v-5s-sft", VideoShape(1, 9, 64, 64), direction, dtype=fp32)
        yield vae_pass("image-lite-t2i-sft", VideoShape(1, 1, 192, 192), direction, dtype=fp32)
        yield vae_pass("nano-video", VideoShape(1, 17, 256, 256), direction, dtype=fp32, budget=128 * 2**20)
    for name in FULL_SIZES:
        yield full_step(name)
    for direction in ("encode", "decode"):
        yield full_vae("image-lite-t2i-sft", direction, budget=4 * 2**30)
        for budget in (16, 4, 2):
            yield full_vae("lite-t2v-5s-sft", direction, budget=budget * 2**30)
    yield loaded("nano-video")
    yield loaded("nano-image")
    for kind in (AS_IS, "int8", "fp8"):
        yield block_weights(variant("lite-t2v-5s-sft"), kind)


def process_cases() -> list[Callable[[], Compared]]:
    """For `benchmarks/planner.py --process`: stages that are large beside what a process takes anyway."""
    bf16, fp32, spent = torch.bfloat16, torch.float32, {"measure": process_peak}
    lite, pro, nano = "lite-t2v-5s-sft", "pro-t2v-5s-sft", "nano-video"
    return [
        *(partial(dit_step, lite, VideoShape(1, 17, 256, 384), dtype=dtype, **spent) for dtype in (fp32, bf16)),
        partial(dit_step, "lite-t2v-10s-sft", VideoShape(1, 17, 256, 384), dtype=fp32, **spent),
        partial(dit_step, pro, VideoShape(1, 9, 256, 384), dtype=bf16, blocks=1, **spent),
        partial(text_pass, 512, layers=1, dtype=bf16, **spent),
        *(partial(vae_pass, lite, VideoShape(1, 17, 64, 96), "decode", dtype=dtype, **spent) for dtype in (fp32, bf16)),
        *(partial(vae_pass, lite, VideoShape(1, 33, 64, 96), direction, dtype=fp32, budget=2**28, **spent)
          for direction in ("encode", "decode")),
        *(partial(vae_pass, nano, VideoShape(1, 65, 128, 128), direction, dtype=fp32, budget=2**27, **spent)
          for direction in ("encode", "decode")),
    ]  # fmt: skip


def table(rows: Iterable[Compared]) -> Iterator[str]:
    """Lines of a Markdown table, each as soon as it is measured."""
    yield from ("| stage | what | predicted MiB | measured MiB | ratio |", "|---|---|---|---|---|")
    for row in rows:
        predicted, measured = (f"{size / 2**20:.1f}" for size in (row.predicted, row.measured))
        yield f"| {row.stage} | {row.what} | {predicted} | {measured} | {row.ratio:.3f} |"


def _shape(shape: VideoShape) -> str:
    batch = f"{shape.batch} x " if shape.batch > 1 else ""
    return f"{batch}{shape.height}x{shape.width}x{shape.frames}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
