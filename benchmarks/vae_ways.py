"""The ways to run a VAE pass that `benchmarks.vae` compares, and how near each comes to the untiled one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kandinsky5_core.shapes import LatentShape
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE
from kandinsky5_core.vae.hunyuan.passes import decode_streamed, encode_streamed
from kandinsky5_core.vae.pass_plan import PassPlan, describe, plan_bytes, plan_pass
from kandinsky5_core.vae.stream_plan import StreamPlan
from kandinsky5_core.vae.tile_plan import TilePlan
from kandinsky5_core.vae.tiling import decode_tiled, encode_tiled, tile_axes

UNTILED, OFFICIAL, DIFFUSERS, OURS = "untiled", "official", "diffusers", "ours"
PASSES = {
    ("encode", TilePlan): encode_tiled, ("encode", StreamPlan): encode_streamed,
    ("decode", TilePlan): decode_tiled, ("decode", StreamPlan): decode_streamed,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a pass."""

    kind: str
    """UNTILED, OFFICIAL, DIFFUSERS or OURS."""
    name: str
    run: Callable[[Tensor], Tensor]
    """Pixels to latents, or latents to pixels."""
    plan: PassPlan | None = None
    budget_mib: float | None = None


def ways_of(
    vae: HunyuanVAE, direction: str, shape: LatentShape, dtype: torch.dtype, parts: int, shares: list[float]
) -> list[Way]:
    """Untiled, official tiles of whole frames and of parts, diffusers', ours with shares of what untiled takes."""
    sizes = {"direction": direction, "bytes_per_element": dtype.itemsize}
    whole = TilePlan(frames=shape.frames, height=shape.height, width=shape.width)
    needed = plan_bytes(whole, shape, vae.config, **sizes)
    ways = [Way(kind=UNTILED, name="untiled", run=lambda given: untiled(vae, direction, given))]
    for count in sorted({1, parts}):
        cut = f", {count}x{count}" if count > 1 else ""
        ways.append(planned(vae, direction, OFFICIAL, f"official, 17 frames{cut}", official_tiles(shape, count)))
    ways.append(Way(kind=DIFFUSERS, name="diffusers, its default tiles", run=diffusers_pass(vae, direction)))
    for share in shares:
        plan = plan_pass(shape, vae.config, budget_bytes=int(share * needed), **sizes)
        name = f"ours, {share:.0%} of untiled: {describe(plan, shape, vae.config)}"
        ways.append(planned(vae, direction, OURS, name, plan, share * needed / 2**20))
    return ways


def planned(
    vae: HunyuanVAE, direction: str, kind: str, name: str, plan: PassPlan, budget_mib: float | None = None
) -> Way:
    """A pass by a plan of this project's."""
    run = PASSES[direction, type(plan)]
    return Way(kind=kind, name=name, run=lambda given: run(vae, given, plan), plan=plan, budget_mib=budget_mib)


@torch.no_grad()
def untiled(vae: HunyuanVAE, direction: str, given: Tensor) -> Tensor:
    """The plain pass."""
    return getattr(vae, direction)(given)


def official_tiles(shape: LatentShape, parts: int) -> TilePlan:
    """The official release's tiles: 17 frames every 8, and `parts` pieces of each side with 32 pixels shared."""
    sides = [size if parts == 1 else min(size, math.ceil(size / parts) + 2) for size in (shape.height, shape.width)]
    overlaps = [4 if side < size else 0 for side, size in zip(sides, (shape.height, shape.width), strict=True)]
    frames = min(5, shape.frames)
    return TilePlan(
        frames=frames, height=sides[0], width=sides[1], overlap_frames=3 if frames < shape.frames else 0,
        overlap_height=overlaps[0], overlap_width=overlaps[1],
    )  # fmt: skip


def diffusers_pass(vae: HunyuanVAE, direction: str) -> Callable[[Tensor], Tensor]:
    """diffusers' class over the same tensors, tiled as it is by default: 17 frames every 12, 256 pixels every 192.

    The original HunyuanVideo code tiles so too; it is what the report's figure for the encoder is relative to.
    """
    import diffusers

    config = vae.config
    levels = len(config.block_out_channels)
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
            down_block_types=("HunyuanVideoDownBlock3D",) * levels, up_block_types=("HunyuanVideoUpBlock3D",) * levels,
            spatial_compression_ratio=config.spatial_ratio, temporal_compression_ratio=config.temporal_ratio,
        ).eval()  # fmt: skip
    theirs.load_state_dict(vae.state_dict(), assign=True)
    theirs.enable_tiling()

    @torch.no_grad()
    def run(given: Tensor) -> Tensor:
        return theirs.encode(given).latent_dist.mean if direction == "encode" else theirs.decode(given).sample

    return run


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of the range of `wanted`, in dB."""
    error = (found.float() - wanted.float()).square().mean()
    return (20 * torch.log10(wanted.float().max() - wanted.float().min()) - 10 * torch.log10(error)).item()


def seams(
    found: Tensor, wanted: Tensor, tiles: TilePlan, shape: LatentShape, direction: str, vae: HunyuanVAE
) -> float:
    """Mean jump of the error from one position to the next where tiles meet, over that elsewhere; 1 without seams."""
    error = (found.float() - wanted.float()).squeeze(0)
    at, away = [], []
    for dim, pieces in enumerate(tile_axes(shape, tiles, vae.config, to_pixels=direction == "decode"), start=1):
        jumps = error.diff(dim=dim).abs().mean(dim=[other for other in range(4) if other != dim])
        edges = {edge for piece in pieces for edge in (piece.write.start, piece.write.stop)}
        met = {edge - 1 for edge in edges if 0 < edge <= len(jumps)}
        at += [jumps[place].item() for place in met]
        away += [jumps[place].item() for place in range(len(jumps)) if place not in met]
    return math.nan if not at or not sum(away) else (sum(at) / len(at)) / (sum(away) / len(away))
