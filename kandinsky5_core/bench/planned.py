"""The planner's arithmetic beside what is measured: bytes of live tensors, which are the same on every run.

Random weights at full width with few blocks, and the embedded Nano models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..attention.nabla import NablaAttention
from ..config import Variant, variant
from ..dit.plan import plan_visual
from ..loading import load
from ..memory import activations, parameters
from ..memory.options import AS_IS
from ..shapes import VideoShape
from ..vae.tiling import decode_tiled, encode_tiled, plan_decode, plan_encode
from . import subjects
from .live import live_peak

CPU = torch.device("cpu")
GATHER = "gather"


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


def dit_step(
    name: str, shape: VideoShape, *, dtype: torch.dtype, blocks: int = 2, text_tokens: int = 64
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
        measured = live_peak(lambda: dit(latents, timestep, text, plan))
    num_tokens = grid[0] * grid[1] * grid[2] if plan.nabla is None else len(plan.nabla.tokens.order)
    predicted = activations.dit_bytes(
        config, num_tokens, dtype.itemsize, batch=shape.batch, text_tokens=text_tokens, nabla=row.nabla is not None,
        on_cpu=True,
    )  # fmt: skip
    what = f"{name}, {config.num_visual_blocks} blocks, {_shape(shape)}, {text_tokens} text tokens, {_name(dtype)}"
    return Compared(stage="dit", what=what, predicted=predicted, measured=measured)


def text_pass(num_tokens: int, *, layers: int, dtype: torch.dtype) -> Compared:
    """Qwen2.5-VL 7B's language model at full width."""
    qwen = subjects.random_qwen(layers, CPU, dtype)
    words = torch.arange(num_tokens)[None]
    with torch.no_grad():
        measured = live_peak(lambda: qwen(input_ids=words, use_cache=False).last_hidden_state)
    predicted = activations.text_bytes(parameters.TextSizes(), num_tokens, dtype.itemsize)
    what = f"Qwen2.5-VL 7B, {layers} layers, {num_tokens} tokens, {_name(dtype)}"
    return Compared(stage="text", what=what, predicted=predicted, measured=measured)


def vae_pass(name: str, shape: VideoShape, direction: str, *, dtype: torch.dtype, budget: int = 2**32) -> Compared:
    """Encoding or decoding, tiled for a budget."""
    config = variant(name).vae
    vae = subjects.random_vae(config, CPU, dtype)
    latents = shape.latent_shape(config)
    pixels = (shape.batch, 3, shape.frames, shape.height, shape.width)
    given = subjects.random_latents(latents if direction == "decode" else pixels, CPU, dtype)
    planned = {"budget_bytes": budget, "bytes_per_element": dtype.itemsize}
    if direction == "decode":
        plan = plan_decode(latents, config, **planned)
        measured = live_peak(lambda: decode_tiled(vae, given, plan))
    else:
        plan = plan_encode(pixels, config, **planned)
        measured = live_peak(lambda: encode_tiled(vae, given, plan))
    predicted = activations.vae_bytes(shape, config, direction, budget=budget, element_size=dtype.itemsize)
    tiles = plan.num_tiles(latents)
    what = f"{config.kind} of {name}, {_shape(shape)}, {tiles} tile{'s' if tiles > 1 else ''}, {_name(dtype)}"
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
    yield loaded("nano-video")
    yield loaded("nano-image")
    for kind in (AS_IS, "int8", "fp8"):
        yield block_weights(variant("lite-t2v-5s-sft"), kind)


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
