"""What a job will need, stage by stage, before anything is loaded: arithmetic on the configuration alone.

All sizes are bytes. `device` is the memory of the accelerator (or what the work takes on a CPU), `cpu` the memory of
the process beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, prod

from ..config import BLOCK_SIDE, GUIDANCE_OFF, NablaConfig, Variant
from ..shapes import VideoShape
from ..vae.tile_plan import DEFAULT_BUDGET_BYTES
from . import activations, parameters
from .options import AS_IS, SWAP_SLOTS, MemoryOptions

TEMPLATE_TOKENS = {"t2v": 129, "i2v": 132, "t2i": 41, "i2i": 55}
"""Around a caption, as Qwen's tokenizer counts them."""
PIXELS_PER_TOKEN = 56
"""Side of what Qwen sees as one token in a picture to edit, which it is shown at half size."""
FRAME_COPIES = 4
"""Finished frames in fp32 on the CPU: as decoded, scaled, clamped and in the order of files."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be made."""

    variant: Variant
    shape: VideoShape
    task: str
    guided: bool = True
    """With a negative pass."""
    nabla: NablaConfig | None = None
    text_tokens: int = 0
    """Of the caption; 0: as many as the variant takes."""
    element_size: int = 2
    """Bytes of a number in the run's dtype."""
    cached: bool = False
    """With a step cache."""
    enhanced: bool = False
    """The text encoder writes the prompt out first."""
    whole: bool = False
    """The feed-forward takes all tokens at once: in compiled blocks, or with weights that ComfyUI casts."""
    given_frames: int = 0
    """Frames of a given clip to encode; 0: as the task says, one picture or nothing."""

    @property
    def encoded_frames(self) -> int:
        """Frames that the VAE encodes."""
        return self.given_frames or (1 if self.task in ("i2v", "i2i") else 0)

    @property
    def caption_tokens(self) -> int:
        """Tokens that the DiT sees: the caption, and of an edit its picture."""
        picture = ceil(self.shape.height / PIXELS_PER_TOKEN) * ceil(self.shape.width / PIXELS_PER_TOKEN)
        return (self.text_tokens or self.variant.max_text_tokens) + (picture if self.task == "i2i" else 0)

    @property
    def num_tokens(self) -> int:
        """Visual tokens of one clip; under NABLA padded to whole token blocks."""
        grid = self.shape.latent_shape(self.variant.vae).token_grid(self.variant.dit.patch_size)
        if self.nabla is None:
            return prod(grid)
        return grid[0] * prod(ceil(side / BLOCK_SIDE) * BLOCK_SIDE for side in grid[1:])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How it is to be run."""

    memory: MemoryOptions = field(default_factory=MemoryOptions)
    guidance_batched: bool = False
    vae_budget_bytes: int = DEFAULT_BUDGET_BYTES


@dataclass(frozen=True, kw_only=True)
class Need:
    """Of one stage."""

    stage: str
    weights: int
    """On the device: the stage's own, and those of networks that stay there."""
    work: int
    """On the device: activations, latents, results."""
    cpu: int

    @property
    def device(self) -> int:
        """All on the device."""
        return self.weights + self.work


def default_job(variant: Variant, *, batch: int = 1, frames: int = 0, height: int = 0, width: int = 0,
                task: str = "") -> Job:  # fmt: skip
    """A job with what is not given taken from the variant.

    Raises:
        ValueError: a task or size that the variant does not take.
    """
    task = task or variant.tasks[0]
    if task not in variant.tasks:
        raise ValueError(f"task '{task}' is not one of {variant.name}; use {', '.join(variant.tasks)}")
    default_height, default_width = variant.resolutions[0]
    frames = 1 if task in ("t2i", "i2i") else frames or variant.num_frames
    shape = VideoShape(batch, frames, height or default_height, width or default_width)
    shape.check(variant.vae)
    guided = abs(variant.sampling.guidance_scale - 1) > GUIDANCE_OFF
    return Job(variant=variant, shape=shape, task=task, guided=guided, nabla=variant.nabla)


def estimate(job: Job, settings: Settings) -> tuple[Need, ...]:
    """What each stage needs, in their order.

    Raises:
        ValueError: the VAE's budget is too small for any tile, or more blocks are swapped than there are.
    """
    weights = network_bytes(job, settings)
    stages = [("text", "text", text_work(job))]
    if job.encoded_frames:
        stages.append(("vae_encode", "vae", vae_work(job, settings, "encode")))
    stages.append(("dit", "dit", dit_work(job, settings)))
    stages.append(("vae_decode", "vae", vae_work(job, settings, "decode")))
    waiting = weights["swapped"]
    loaded = sum(weights[name] for name in ("text", "dit", "vae")) + waiting - slot_bytes(job, settings)
    loading = Need(stage="load", weights=0, work=0, cpu=loaded)
    needs = [loading]
    for stage, network, work in stages:
        there = [network] if settings.memory.offload == "stage" else ["text", "dit", "vae"]
        held = sum(weights[name] for name in there)
        # Swapped blocks have their slots on the device beside their weights in CPU memory.
        left = max(0, loaded - held + (slot_bytes(job, settings) if "dit" in there else 0))
        frames = FRAME_COPIES * pixel_bytes(job) if stage == "vae_decode" else 0
        needs.append(Need(stage=stage, weights=held, work=work, cpu=left + frames))
    return tuple(needs)


def network_bytes(job: Job, settings: Settings) -> dict[str, int]:
    """Weights on the device in each network's stage, and under 'swapped' those that wait in CPU memory all the time."""
    memory, config = settings.memory, job.variant.dit
    if memory.swap_blocks > config.num_visual_blocks:
        raise ValueError(f"swap_blocks {memory.swap_blocks} is more than the {config.num_visual_blocks} visual blocks")
    block = parameters.visual_block(config).num_bytes(memory.weights, job.element_size)
    swapped = memory.swap_blocks * block
    whole = parameters.dit(config).num_bytes(memory.weights, job.element_size)
    return {
        "text": parameters.text_sizes(job.variant).num_bytes(
            memory.text_weights, job.element_size, head=job.enhanced
        ),
        "dit": whole - swapped + slot_bytes(job, settings),
        "vae": parameters.vae(job.variant.vae) * job.element_size,
        "swapped": swapped,
    }


def slot_bytes(job: Job, settings: Settings) -> int:
    """Room on the device for the swapped blocks that compute and that come next."""
    block = parameters.visual_block(job.variant.dit).num_bytes(settings.memory.weights, job.element_size)
    return SWAP_SLOTS * block if settings.memory.swap_blocks else 0


def text_work(job: Job) -> int:
    """Reading the last prompt: Qwen's activations beside what was read before."""
    sizes = parameters.text_sizes(job.variant)
    reading = activations.text_bytes(sizes, job.caption_tokens + TEMPLATE_TOKENS[job.task], job.element_size)
    rows = conditioning_bytes(job)
    one = rows // (2 if job.guided else 1)
    # Or at the end, when the last rows lie there as they were read and as they are given on.
    return max(reading + rows - one, rows + one)


def conditioning_bytes(job: Job) -> int:
    """Embeddings of the caption and, with guidance, of the negative prompt, padded to what the variant takes."""
    rows = job.shape.batch * (2 if job.guided else 1)
    length = max(job.caption_tokens, job.variant.max_text_tokens)
    return rows * length * job.variant.dit.in_text_dim * job.element_size


def dit_work(job: Job, settings: Settings) -> int:
    """Sampling: one evaluation's activations, the loop around it, the rotary table and the conditioning."""
    config = job.variant.dit
    evaluations = 2 if settings.guidance_batched and job.guided else 1
    latents = job.shape.latent_shape(job.variant.vae)
    step = activations.dit_bytes(
        config, job.num_tokens, job.element_size, batch=job.shape.batch * evaluations, text_tokens=job.caption_tokens,
        nabla=job.nabla is not None, whole=job.whole,
    )  # fmt: skip
    around = activations.sampler_bytes(latents, config, job.element_size, evaluations=evaluations)
    step += activations.UNPACKED_BYTES.get(settings.memory.weights, 0) * config.ff_dim * config.model_dim
    if job.cached:
        step += activations.step_cache_bytes(
            config, job.num_tokens, job.element_size, batch=job.shape.batch, evaluations=evaluations, guided=job.guided
        )
    return step + around + activations.rope_bytes(config, job.num_tokens) + conditioning_bytes(job)


def vae_work(job: Job, settings: Settings, direction: str) -> int:
    """A VAE pass with what it reads: latents to decode; the first frame, the picture or a clip to encode."""
    shape = job.shape
    if direction == "encode":
        shape = shape._replace(frames=job.encoded_frames)
    passed = activations.vae_bytes(
        shape, job.variant.vae, direction, budget=settings.vae_budget_bytes, element_size=job.element_size
    )
    # Kernels of convolutions take room of their own, which live tensors do not show.
    return ceil(activations.WORKSPACE * passed) + 2 * activations.FP32 * prod(shape.latent_shape(job.variant.vae))


def pixel_bytes(job: Job) -> int:
    """The finished frames in fp32."""
    return 3 * activations.FP32 * prod(job.shape)


def without_offload(settings: Settings) -> Settings:
    """The same with all networks on the device."""
    return replace(settings, memory=replace(settings.memory, offload="none"))


def is_lossless(memory: MemoryOptions) -> bool:
    """Whether results are those of the plain path."""
    return memory.weights == AS_IS and memory.text_weights == AS_IS
