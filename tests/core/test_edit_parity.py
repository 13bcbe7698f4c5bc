"""The whole edit path, picture to latents, against diffusers' image-to-image pipeline on random weights."""

from dataclasses import replace

import diffusers
import pytest
import torch

from kandinsky5_core import pipeline
from kandinsky5_core.conditioning import TextConditioning
from kandinsky5_core.config import NANO_IMAGE_VAE, DiTConfig, variant
from kandinsky5_core.dit.model import DiffusionTransformer
from kandinsky5_core.inputs import encode_inputs
from kandinsky5_core.pipeline import Models, sample_latents
from kandinsky5_core.request import Request, resolve
from kandinsky5_core.sampling.schedule import flow_schedule
from kandinsky5_core.shapes import LatentShape
from kandinsky5_core.vae.flux import FluxVAE

CONFIG = DiTConfig(
    in_text_dim=24, in_text_dim2=12, time_dim=32, model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(4, 6, 6),
)  # fmt: skip
STEPS, SHIFT = 4, 3.0


class ReleasedSchedule:
    """The official sigmas and Euler steps where diffusers' own scheduler has others (facts sheet 9.1)."""

    order = 1

    def set_timesteps(self, num_steps, device=None):
        self.sigmas = flow_schedule(num_steps, SHIFT)
        self.timesteps = 1000 * self.sigmas[:-1]

    def step(self, velocity, timestep, latents, return_dict=False):
        index = int((self.timesteps - timestep).abs().argmin())
        return (latents + (self.sigmas[index + 1] - self.sigmas[index]) * velocity,)


def weights(module, scale):
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * scale
    return module.eval()


def their_vae():
    config = NANO_IMAGE_VAE
    levels = len(config.block_out_channels)
    vae = diffusers.AutoencoderKL(
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block, latent_channels=16,
        norm_num_groups=config.norm_num_groups, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=config.scaling_factor,
    )  # fmt: skip
    weights(vae, 0.08)
    # Their pipeline samples the posterior; with no variance the sample is the mean.
    vae.encoder.conv_out.weight.data[16:] = 0
    vae.encoder.conv_out.bias.data[16:] = -30
    return vae


def conditioning(length):
    return TextConditioning(
        embeds=torch.randn(1, length, 24), pooled=torch.randn(1, 12), mask=torch.ones(1, length, dtype=torch.bool)
    )


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_edits_equal_the_reference(guidance, monkeypatch):
    torch.manual_seed(int(10 * guidance))
    fields = ("in_visual_dim", "out_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "patch_size", "model_dim",
              "ff_dim", "num_text_blocks", "num_visual_blocks", "axes_dims", "visual_cond")  # fmt: skip
    their_dit = weights(
        diffusers.Kandinsky5Transformer3DModel(**{name: getattr(CONFIG, name) for name in fields}), 0.15
    )
    vae = their_vae()
    pipe = diffusers.Kandinsky5I2IPipeline(
        transformer=their_dit, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        scheduler=None,
    )  # fmt: skip
    pipe.scheduler = ReleasedSchedule()
    pipe.set_progress_bar_config(disable=True)
    pipe.resolutions = [(64, 96)]
    positive, negative = conditioning(9), conditioning(5)
    picture = torch.randint(0, 256, (96, 64, 3)).float() / 255
    expected = pipe(
        image=picture.permute(2, 0, 1)[None], height=96, width=64, num_inference_steps=STEPS, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7), output_type="latent",
        prompt_embeds_qwen=positive.embeds, prompt_embeds_clip=positive.pooled, prompt_cu_seqlens=torch.tensor([0, 9]),
        negative_prompt_embeds_qwen=negative.embeds, negative_prompt_embeds_clip=negative.pooled,
        negative_prompt_cu_seqlens=torch.tensor([0, 5]),
    ).image  # fmt: skip

    dit = DiffusionTransformer(CONFIG).eval()
    dit.load_state_dict(their_dit.state_dict())
    our_vae = FluxVAE(NANO_IMAGE_VAE).eval()
    our_vae.load_state_dict(vae.state_dict())
    models = Models(
        variant=replace(variant("nano-edit"), dit=CONFIG), dit=dit, text_encoder=None, vae=our_vae,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    request = resolve(
        Request(prompt="x", task="i2i", image=picture, height=96, width=64, num_steps=STEPS, shift=SHIFT,
                guidance_scale=guidance),
        models.variant,
    )  # fmt: skip
    noise = torch.randn(1, 1, 12, 8, 16, generator=torch.Generator().manual_seed(7)).permute(0, 4, 1, 2, 3)
    monkeypatch.setattr(pipeline, "initial_noise", lambda shape, seed: noise)
    shape = LatentShape(1, 16, 1, 12, 8)
    with torch.no_grad():
        inputs = encode_inputs(models, request, shape)
        latents = sample_latents(models, request, shape, positive, negative, inputs)
    assert float(inputs.image.source.std()) > 1e-3
    expected = expected.permute(0, 4, 1, 2, 3)
    assert float((latents - expected).abs().max() / expected.abs().max()) < 2e-5
