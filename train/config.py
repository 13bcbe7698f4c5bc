"""Settings of training: what moves, on what, for how long. Standard library only, so that nodes can import it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(repr(choice) for choice in choices)}, got '{value}'{hint}")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how fast; what is minimised is the objective's business."""

    num_steps: int
    learning_rate: float
    """Peak of the schedule."""
    warmup_steps: int = 100
    schedule: str = "cosine"
    """'cosine' falls to `final_rate` of the peak at the last step; 'constant' stays."""
    final_rate: float = 0.02
    optimizer: str = "adamw"
    """'adamw'; 'adamw8bit' (needs bitsandbytes); or 'muon' for the matrices inside transformer blocks with AdamW for
    the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    accumulation: int = 1
    """Batches whose gradients make one step."""
    ema_decay: float = 0.9999
    """Of the averaged weights that are saved as the result; warmed up as (1+n)/(10+n). 0: the weights themselves."""
    checkpoint_every: int = 500
    keep_last: int = 2
    """Checkpoints that stay beside the best one; older ones are removed."""
    explode_factor: float = 5.0
    """The run ends when the smoothed loss is so many times its lowest value."""
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16 in the forward pass."""

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, ("cosine", "constant"))
        _check_choice("optimizer", self.optimizer, ("adamw", "adamw8bit", "muon"))
        for name in ("num_steps", "accumulation", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")
        if self.explode_factor <= 1:
            raise ValueError(f"explode_factor must be above 1, got {self.explode_factor}")


TARGETS = (
    "self_attention.to_query", "self_attention.to_key", "self_attention.to_value", "self_attention.out_layer",
    "cross_attention.to_query", "cross_attention.to_key", "cross_attention.to_value", "cross_attention.out_layer",
    "feed_forward.in_layer", "feed_forward.out_layer",
)  # fmt: skip
"""The ten linear layers of a block that the official LoRAs move."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    """Endings of the names of the layers that get one."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""
    least_strength: float = 1.0
    """Below 1 each step trains at a random strength from this to 1. Such a LoRA also works where it is weakened: in a
    soup of two at half its strength."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be from 0 to below 1, got {self.dropout}")
        if not 0 < self.least_strength <= 1:
            raise ValueError(f"LoRA least_strength must be above 0 and at most 1, got {self.least_strength}")
        if not self.targets:
            raise ValueError("LoRA targets is empty; name at least one ending of a layer's name")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


TASKS = ("t2v", "i2v", "t2i", "i2i")
LOW_AREA, MEDIUM_AREA = 256 * 384, 512 * 768
"""Pixels of a frame up to which a resolution counts as low, and as medium (report section 6.1)."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One folder or table of training material."""

    path: str
    """A folder of images, clips or edit pairs with `.txt` captions; or a `.jsonl`, `.csv` or `.parquet` table."""
    repeats: int = 1
    """How often an epoch shows it."""
    domain: str = ""
    """Name for soups; empty: the first folder below `path`, or the table's column `domain`."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats of {self.path} must be at least 1, got {self.repeats}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how it is cut into batches."""

    sources: tuple[SourceConfig, ...]
    area: int = 0
    """Pixels of a frame that buckets aim at; 0 is the variant's own resolutions."""
    max_frames: int = 0
    """Longest clip in pixel frames, 4k+1; 0 is the variant's own length."""
    min_side: int = 0
    """Smaller images and clips are left out; 0: a quarter of the bucket's shorter side."""
    trigger: str = ""
    """Word put before every caption, and into the file's metadata."""
    tasks: tuple[tuple[str, float], ...] = ()
    """Probability of each task (t2v, i2v, t2i, i2i); empty: what the variant and the material allow, in the report's
    proportions (section 6.1)."""
    caption_dropout: float = 0.1
    """Share of samples that are shown without their caption, for guidance."""
    frame_budget: int = 0
    """Latent frames in one batch, filled from the queue of one bucket; 0: one longest clip."""
    image_batch: int = 0
    """Pictures in an image-only batch; 0: the frame budget."""
    cache_text: bool = True
    """Keep text embeddings beside the latents, so that the text encoders need not stay in memory."""
    cache: str = ""
    """Folder of the shards; empty: in the job's folder. One cache may serve many jobs."""
    drop_duplicates: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; give at least one folder or table")
        if self.max_frames and self.max_frames % 4 != 1:
            raise ValueError(f"max_frames must be 4k+1 (1, 5, 9, ... 121), got {self.max_frames}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be from 0 to 1, got {self.caption_dropout}")
        for task, share in self.tasks:
            _check_choice("task", task, TASKS)
            if share < 0:
                raise ValueError(f"the probability of task {task} must not be negative, got {share}")
        for name in ("area", "min_side", "frame_budget", "image_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Noise levels that flow matching trains on."""

    distribution: str = "logit_normal"
    """'uniform' or 'logit_normal' (sigmoid of a normal draw)."""
    shift: float = 0.0
    """Warp of the drawn level as in the sampling schedule: 1 for none, 0 for the variant's own shift."""

    def __post_init__(self) -> None:
        _check_choice("distribution", self.distribution, ("uniform", "logit_normal"))
        if self.shift < 0:
            raise ValueError(f"shift must be positive, or 0 for the variant's own, got {self.shift}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One sample that is made while training, always from the same noise."""

    prompt: str
    image: str = ""
    """File to begin from (image to video) or to edit."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is looked at while training."""

    every: int = 250
    """Steps between samples and validation losses; 0 for none."""
    samples: tuple[SampleConfig, ...] = ()
    num_steps: int = 0
    """Sampling steps; 0 for the variant's."""
    height: int = 0
    width: int = 0
    num_frames: int = 0
    """Size of the samples; 0 for the variant's."""
    holdout: float = 0.0
    """Share of the material that is not trained on and gives the validation loss; 0: eight training batches with
    fixed noise give it."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every must not be negative, got {self.every}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"validation.holdout must be from 0 to below 1, got {self.holdout}")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A whole training job, as `job.json` holds it."""

    name: str = "training"
    model: str
    """An embedded model's name, or the path of a DiT file or folder."""
    text_encoder: str = ""
    clip: str = ""
    vae: str = ""
    tokenizers: str = ""
    variant: str = ""
    """A row of the core's variants where one file serves several; empty: found from the file."""
    data: DataConfig
    lora: LoraConfig | None = None
    """None: all weights move."""
    fit: FitConfig
    flow: FlowConfig = FlowConfig()
    validation: ValidationConfig = ValidationConfig()
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1', ..."""
    dtype: str = ""
    """Of the weights: 'fp32' or 'bf16'; empty: fp32 for weights that move and on the CPU, bf16 for a frozen base."""
    base_weights: str = ""
    """'' or 'int8', 'fp8': the linear layers of a frozen base in eight bits."""
    gradient_checkpointing: bool = False
    nabla: str = "auto"
    """'auto' as the variant was trained, 'on', 'off'."""
    output_folder: str = ""
    """Where the finished result goes, under a name made of the job's, the variant's, the rank and the steps; empty:
    `result/` in the job's folder."""
    only_cache: bool = False
    """Encode the material and end."""
    layout: str = "diffusers"
    """Key format of a LoRA: diffusers (every known loader reads it), comfyui, official or kohya."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got '{self.device}'")
        _check_choice("base_weights", self.base_weights, ("", "int8", "fp8"))
        _check_choice("dtype", self.dtype, ("", "fp32", "bf16"))
        _check_choice("nabla", self.nabla, ("auto", "on", "off"))
        _check_choice("layout", self.layout, ("comfyui", "official", "diffusers", "kohya"))
        if self.base_weights and self.lora is None:
            raise ValueError("base_weights needs a LoRA: weights that move cannot be kept in eight bits")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values for JSON."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[ConfigT], values: Mapping[str, Any], where: str = "") -> ConfigT:
    """Build a config, and those inside it, from plain values.

    Raises:
        ValueError: names the key that is unknown (with the nearest valid one), missing or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or config_class.__name__} must be an object with keys, got {values!r}")
    hints = typing.get_type_hints(config_class)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys are {', '.join(hints)}"
            raise ValueError(f"unknown key '{where}{key}'; {hint}")
    given = {key: _typed(hints[key], value, f"{where}{key}") for key, value in values.items()}
    missing = [
        field.name for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.name not in given and field.default is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"'{where}{missing[0]}' is missing")
    return config_class(**given)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` says; JSON's lists become tuples."""
    options = typing.get_args(hint)
    if type(None) in options:
        return None if value is None else _typed(options[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"'{where}' must be a list, got {value!r}")
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else options
        if len(kinds) != len(value):
            raise ValueError(f"'{where}' must have {len(kinds)} entries, got {len(value)}")
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_typed(kind, part, f"{where}[{number}]") for number, (kind, part) in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ValueError(f"'{where}' must be {_NAMES[hint]}, got {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}

