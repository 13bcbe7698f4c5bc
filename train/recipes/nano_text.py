"""The Nano text encoders: a small Qwen2.5-VL and a small CLIP text tower, with tokenizers of their own.

Both are trained, then frozen. A language model's last hidden state need not keep the word it has just read, so
beside next-token prediction linear probes ask the caption tokens, and CLIP's pooled vector, for what was said; the
probes are thrown away. The Qwen also learns to answer the prompt enhancer. There are two pairs: one for clips, one
for pictures, whose Qwen reads instructions together with the picture that they are about.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kandinsky5_core.nano.drawing import random_pair, random_scene
from kandinsky5_core.nano.edits import KINDS, varied_instruction
from kandinsky5_core.nano.language import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    caption,
    varied_caption,
)
from kandinsky5_core.text.encoder import EDIT_IMAGE_DIVISOR
from kandinsky5_core.text.enhancer import chat_text
from kandinsky5_core.text.templates import IMAGE, IMAGE_EDIT, IMAGE_PAD, IMAGE_TO_VIDEO, VIDEO, Template
from kandinsky5_core.text.vision import make_image_processor, prepare_images, shrink, to_pil

from ..config import FitConfig
from ..loop import fit
from .nano_tokenizers import build_clip_tokenizer, build_qwen_tokenizer

SEED = 30
QWEN_DIM, CLIP_DIM = 128, 64
QWEN = FitConfig(num_steps=700, learning_rate=3e-3, warmup_steps=60, ema_decay=0.99, checkpoint_every=200, seed=SEED)
PICTURE_QWEN = replace(QWEN, num_steps=2000)
CLIP = FitConfig(num_steps=1500, learning_rate=2e-3, warmup_steps=100, ema_decay=0.995, checkpoint_every=500, seed=SEED)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "background": tuple(BACKGROUNDS),
}
EDIT_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **{name: ATTRIBUTES[name] for name in ("size", "color", "shape", "background")},
    "kind": KINDS,
    "subject": SHAPES,
    "value": (*COLORS, *BACKGROUNDS, *SHAPES),
    "picture_color": tuple(COLORS),
    "picture_shape": SHAPES,
    "picture_background": tuple(BACKGROUNDS),
}
"""Probes of the pair for pictures; those of the picture are asked of the Qwen alone."""
ABSENT = "absent"
"""A class of every attribute: the text does not say it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text, what it says, and the picture it is about."""

    text: str
    template: Template
    facts: dict[str, str]
    """Attribute to value; others are absent."""
    picture: Tensor | None = None
    """(H, W, 3)."""
    answer: str = ""
    """What the prompt enhancer should make of it; empty: no example."""
    task: str = "t2v"


Draw = Callable[[random.Random], Sample]


def clip_sample(rng: random.Random) -> Sample:
    """A caption of a clip, or now and then of a picture, for the video models."""
    return _caption_sample(rng, moving=rng.random() < 0.7)


def picture_sample(rng: random.Random) -> Sample:
    """A caption of a picture, or an instruction with its picture."""
    if rng.random() < 0.4:
        return _caption_sample(rng, moving=False)
    scene, edit, before, _ = random_pair(rng, (64, 64))
    facts = {"kind": edit.kind, "picture_color": scene.color, "picture_shape": scene.shape,
             "picture_background": scene.background}  # fmt: skip
    facts |= {"value": edit.value} if edit.value else {}
    facts |= {"subject": edit.shape} if edit.kind != "background" else {}
    text = varied_instruction(edit, rng)
    return Sample(text=text, template=IMAGE_EDIT, facts=facts, picture=before, task="i2i")


def _caption_sample(rng: random.Random, *, moving: bool) -> Sample:
    scene = random_scene(rng)
    text = varied_caption(scene, rng, moving=moving)
    facts = {name: value for name, value in vars(scene).items() if value is not None and value in text.lower()}
    full = scene if scene.size in text else replace(scene, size="big")
    return Sample(
        text=text, template=VIDEO if moving else IMAGE, facts=facts, answer=caption(full, moving=moving),
        task="t2v" if moving else "t2i",
    )  # fmt: skip


def language_texts(*, edits: bool = False) -> list[str]:
    """Sentences that hold every word of the language and of the instructions, for the tokenizers."""
    rng = random.Random(SEED)
    texts = [varied_caption(random_scene(rng), rng, moving=moving) for moving in (True, False) for _ in range(400)]
    if edits:
        texts += [varied_instruction(random_pair(rng, (16, 16))[1], rng) for _ in range(800)]
    return texts + [text.lower() for text in texts] + [f" {text}" for text in texts]


def _template_texts() -> list[str]:
    instructions = [chat_text("a red circle", task) for task in ("t2v", "i2v", "t2i", "i2i")]
    return [template.wrap(" ") for template in (VIDEO, IMAGE, IMAGE_EDIT, IMAGE_TO_VIDEO)] + instructions


class Probed(nn.Module):
    """An encoder with linear probes for the attributes on its output vector."""

    def __init__(self, encoder: nn.Module, dim: int, attributes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes = {name: (ABSENT, *values) for name, values in attributes.items()}
        self.probes = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in self.classes.items()})

    def probe_loss(self, vectors: Tensor, samples: list[Sample]) -> Tensor:
        """Mean cross-entropy of all attributes."""
        losses = []
        for name, classes in self.classes.items():
            target = torch.tensor([classes.index(sample.facts.get(name, ABSENT)) for sample in samples])
            losses.append(F.cross_entropy(self.probes[name](vectors), target))
        return torch.stack(losses).mean()


def _samples(draw: Draw, generator: torch.Generator, count: int) -> list[Sample]:
    rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
    return [draw(rng) for _ in range(count)]


@dataclass
class ClipObjective:
    """Attributes from the pooled output."""

    tokenizer: object
    draw: Draw

    def __call__(self, model: Probed, step: int, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        samples = _samples(self.draw, generator, 64)
        tokens = self.tokenizer([sample.text for sample in samples], padding=True, return_tensors="pt")
        pooled = model.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return {"loss": model.probe_loss(pooled, samples)}


@dataclass
class QwenObjective:
    """Next token and attributes on templated texts; every fourth step the enhancer's answers instead."""

    tokenizer: object
    draw: Draw
    processors: list[object] = field(default_factory=list)
    """The image processor, made at the first use."""

    def __call__(self, model: Probed, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self._enhance(model, generator) if step % 4 == 3 else self._read(model, generator)

    def _read(self, model: Probed, generator: torch.Generator) -> dict[str, Tensor]:
        """Captions and instructions in batches of their own: their vectors start behind different crops."""
        losses, probes, told = [], [], _samples(self.draw, generator, 16)
        for group in ([s for s in told if s.picture is None], [s for s in told if s.picture is not None]):
            if group:
                probe, next_token = self._read_group(model, group)
                losses.append((probe + 0.5 * next_token) * len(group) / len(told))
                probes.append(probe.detach() * len(group) / len(told))
        return {"loss": torch.stack(losses).sum(), "probes": torch.stack(probes).sum()}

    def _read_group(self, model: Probed, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        inputs = self._inputs(model.encoder, samples)
        output = model.encoder(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"].bool()
        crops = [self._length(sample.template.prefix) + sample.template.lost_tokens for sample in samples]
        kept = mask & (torch.arange(mask.shape[1]) >= torch.tensor(crops)[:, None])
        weights = kept[..., None].float()
        vectors = (output.hidden_states[-1] * weights).sum(1) / weights.sum(1)
        text = kept & (inputs["input_ids"] != model.encoder.config.image_token_id)
        return model.probe_loss(vectors, samples), self._next_token(output.logits, inputs["input_ids"], text)

    def _enhance(self, model: Probed, generator: torch.Generator) -> dict[str, Tensor]:
        samples = [sample for sample in _samples(self.draw, generator, 32) if sample.answer][:4]
        prompts = [chat_text(sample.text, sample.task) for sample in samples]
        ids, mask = self._tokens([f"{p}{s.answer}<|im_end|>" for p, s in zip(prompts, samples, strict=True)])
        lengths = [self._length(prompt) for prompt in prompts]
        answer = mask & (torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None])
        answers_loss = self._next_token(model.encoder(input_ids=ids).logits, ids, answer)
        return {"loss": answers_loss, "answers": answers_loss}

    def _inputs(self, encoder: Qwen2_5_VLForConditionalGeneration, samples: list[Sample]) -> dict[str, Tensor]:
        texts = [sample.template.wrap(sample.text, 0 if sample.picture is None else 1) for sample in samples]
        pictures = [shrink(to_pil(s.picture), EDIT_IMAGE_DIVISOR) for s in samples if s.picture is not None]
        if not pictures:
            ids, mask = self._tokens(texts)
            return {"input_ids": ids, "attention_mask": mask.long()}
        if not self.processors:
            self.processors.append(make_image_processor(encoder.config.vision_config))
        images = prepare_images(self.processors[0], pictures)
        ids, mask = self._tokens(
            [text.replace(IMAGE_PAD, IMAGE_PAD * count) for text, count in zip(texts, images.num_tokens, strict=True)]
        )
        return {
            "input_ids": ids, "attention_mask": mask.long(), "pixel_values": images.pixel_values,
            "image_grid_thw": images.grid_thw, "mm_token_type_ids": (ids == encoder.config.image_token_id).int(),
        }  # fmt: skip

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"].bool()

    @staticmethod
    def _next_token(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = counted[:, 1:].flatten().float()
        return (loss * weights).sum() / weights.sum().clamp_min(1)


def _qwen(tokenizer: object) -> Qwen2_5_VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    ends = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": QWEN_DIM, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False, "use_sliding_window": False, **ends,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": QWEN_DIM,
            "fullatt_block_indexes": [1], "window_size": 112,
        },
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False, **ends,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _clip(tokenizer: object) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_DIM, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=CLIP_DIM,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config)


def _finish(probed: Probed, average: dict[str, Tensor], folder: Path) -> None:
    probed.load_state_dict(average, strict=False)
    probed.encoder.to(torch.float16).save_pretrained(folder, safe_serialization=True)


def train_text(folder: Path) -> None:
    """Make the pair for clips in `folder`: `qwen` and `clip`."""
    _train_pair(folder, clip_sample, ATTRIBUTES, language_texts(), QWEN)


def train_picture_text(folder: Path) -> None:
    """Make the pair for pictures and edits in `folder`: `qwen` and `clip`."""
    _train_pair(folder, picture_sample, EDIT_ATTRIBUTES, language_texts(edits=True), PICTURE_QWEN)


def _train_pair(
    folder: Path, draw: Draw, attributes: dict[str, tuple[str, ...]], texts: list[str], qwen_config: FitConfig
) -> None:
    qwen_folder, clip_folder = folder / "qwen", folder / "clip"
    qwen_tokenizer = build_qwen_tokenizer(_template_texts() + texts, qwen_folder)
    clip_tokenizer = build_clip_tokenizer(texts, clip_folder)
    said = {name: values for name, values in attributes.items() if not name.startswith("picture_")}
    torch.manual_seed(SEED)
    clip = Probed(_clip(clip_tokenizer), CLIP_DIM, said)
    average = fit(clip, ClipObjective(clip_tokenizer, draw), CLIP, folder / "clip-run")
    _finish(clip, average.state_dict(), clip_folder)
    torch.manual_seed(SEED)
    qwen = Probed(_qwen(qwen_tokenizer), QWEN_DIM, attributes)
    average = fit(qwen, QwenObjective(qwen_tokenizer, draw), qwen_config, folder / "qwen-run")
    _finish(qwen, average.state_dict(), qwen_folder)
