"""The VAE as a row of units, in the order of its forward, for passes that do not hold a clip at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .layers import Downsample, Upsample
from .model import HunyuanVAE


class Head(NamedTuple):
    """Norm, SiLU and the last causal convolution."""

    norm: nn.Module
    conv: nn.Module


def decoder_units(vae: HunyuanVAE) -> list[nn.Module | Head]:
    """Latents to pixels."""
    decoder = vae.decoder
    return [
        vae.post_quant_conv,
        decoder.conv_in,
        *_mid(decoder.mid_block),
        *(layer for block in decoder.up_blocks for layer in (*block.resnets, *block.upsamplers)),
        Head(decoder.conv_norm_out, decoder.conv_out),
    ]


def encoder_units(vae: HunyuanVAE) -> list[nn.Module | Head]:
    """Pixels to moments."""
    encoder = vae.encoder
    return [
        encoder.conv_in,
        *(layer for block in encoder.down_blocks for layer in (*block.resnets, *block.downsamplers)),
        *_mid(encoder.mid_block),
        Head(encoder.conv_norm_out, encoder.conv_out),
        vae.quant_conv,
    ]


def _mid(block: nn.Module) -> list[nn.Module]:
    return [block.resnets[0], block.attentions[0], block.resnets[1]]


def decoder_cut(units: list[nn.Module | Head], exact_levels: int) -> int:
    """Index of the unit that ends the `exact_levels` coarsest levels: an upsampling, or the end."""
    cuts = [index for index, unit in enumerate(units) if isinstance(unit, Upsample)]
    return [*cuts, len(units)][exact_levels - 1]


def encoder_cut(units: list[nn.Module | Head], exact_levels: int) -> int:
    """Index of the unit that begins the `exact_levels` coarsest levels: the one after a downsampling, or the first."""
    cuts = [index + 1 for index, unit in enumerate(units) if isinstance(unit, Downsample)]
    return [0, *cuts][-exact_levels]
