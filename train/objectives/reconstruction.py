"""What a Nano VAE learns: the fixed linear code, and pixels back from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kandinsky5_core.vae.flux import FluxVAE
from kandinsky5_core.vae.hunyuan.model import HunyuanVAE

from ..recipes.nano_latents import LinearCode

SHAPE_WEIGHT = 6.0
"""Weight of pixels that differ from the background: most of a frame is background and learned at once."""


class CodeReconstruction:
    """Encoder towards the code, decoder from the code; neither waits for the other.

    Args:
        clips: (N, F, H, W, 3) uint8, the pool that batches are cut from.
        code: The latents to be learned.
        batch_size: Clips a step.
        num_frames: Frames kept from the beginning of each clip, 4k+1.
        crop: Side of the square piece that is cut out, a multiple of 8; the clip's side keeps all of it.
        joint_weight: Weight of the pixel loss through encoder and decoder together.
        noise: Standard deviation of the noise on the decoder's latents: the DiT's are not exact either.
    """

    def __init__(
        self, clips: Tensor, code: LinearCode, *, batch_size: int, num_frames: int, crop: int,
        joint_weight: float = 0.0, noise: float = 0.05,
    ) -> None:  # fmt: skip
        self.clips, self.code = clips, code
        self.batch_size, self.num_frames, self.crop = batch_size, num_frames, crop
        self.joint_weight, self.noise = joint_weight, noise
        self.channel_weights = code.error_weights.view(1, -1, 1, 1, 1)

    def __call__(self, model: HunyuanVAE | FluxVAE, step: int, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """Losses of one batch: 'code' for the encoder, 'pixels' for the decoder, 'joint' for both."""
        frames = self._batch(generator)
        target = self.code.encode(frames)
        pixels = rearrange(frames * 2 - 1, "b f h w c -> b c f h w")
        weight = self._pixel_weight(pixels)
        mean, logvar = model.moments(pixels)
        error = (mean.float() - target).square()
        # The variance only reports how far the mean is off; it must not pull on the mean.
        variance = F.gaussian_nll_loss(mean.detach().float(), target, logvar.float().exp(), eps=1e-4)
        noisy = target + self.noise * torch.randn(target.shape, generator=generator)
        losses = {
            "code": (error * self.channel_weights).mean(),
            "pixels": (weight * (model.decode(noisy).float() - pixels).square()).mean(),
        }
        if self.joint_weight:
            losses["joint"] = (weight * (model.decode(mean.float()).float() - pixels).square()).mean()
        loss = losses["code"] + 3 * losses["pixels"] + self.joint_weight * losses.get("joint", torch.zeros(()))
        return {"loss": loss + 0.01 * variance, **losses}

    def _batch(self, generator: torch.Generator) -> Tensor:
        picks = torch.randint(len(self.clips), (self.batch_size,), generator=generator)
        clips = self.clips[picks, : self.num_frames].float() / 255
        cells = (clips.shape[2] - self.crop) // 8 + 1
        if cells == 1:
            return clips
        return torch.stack([self._cut(clip, cells, generator) for clip in clips])

    def _cut(self, clip: Tensor, cells: int, generator: torch.Generator) -> Tensor:
        """Of two random pieces the one with more to see."""
        corners = torch.randint(cells, (2, 2), generator=generator) * 8
        pieces = [clip[:, y : y + self.crop, x : x + self.crop] for y, x in corners.tolist()]
        return max(pieces, key=lambda piece: float(piece.var()))

    @staticmethod
    def _pixel_weight(pixels: Tensor) -> Tensor:
        """(B, 1, F, H, W), mean 1: more where a pixel differs from its clip's median colour."""
        background = pixels.flatten(2).median(dim=2).values[:, :, None, None, None]
        shape = ((pixels - background).abs().amax(dim=1, keepdim=True) > 0.05).float()
        weight = 1 + (SHAPE_WEIGHT - 1) * shape
        return weight / weight.mean()
