"""The Nano text encoders: a small Qwen2.5-VL and a small CLIP text tower, with tokenizers of their own.

Both are trained, then frozen. A language model's last hidden state need not keep the word it has just read, so
beside next-token prediction linear probes ask the caption tokens, and CLIP's pooled vector, for size, colour,
shape, motion and background; the probes are thrown away. The Qwen also learns to answer the prompt enhancer.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from kandinsky5_core.nano.drawing import random_scene
from kandinsky5_core.nano.language import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    varied_caption,
)
from kandinsky5_core.text.enhancer import chat_text
from kandinsky5_core.text.templates import IMAGE, IMAGE_EDIT, IMAGE_TO_VIDEO, VIDEO

from ..config import FitConfig
from ..loop import fit
from .nano_tokenizers import build_clip_tokenizer, build_qwen_tokenizer

SEED = 30
QWEN_DIM, CLIP_DIM = 128, 64
QWEN = FitConfig(num_steps=700, learning_rate=3e-3, warmup_steps=60, ema_decay=0.99, checkpoint_every=200, seed=SEED)
CLIP = FitConfig(num_steps=1500, learning_rate=2e-3, warmup_steps=100, ema_decay=0.995, checkpoint_every=500, seed=SEED)
ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "size": (None, *SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": (None, *DIRECTIONS),
    "background": tuple(BACKGROUNDS),
}


def language_texts() -> list[str]:
    """Sentences that hold every word of the language and of the instructions, for the tokenizers."""
    rng = random.Random(SEED)
    texts = [varied_caption(random_scene(rng), rng, moving=moving) for moving in (True, False) for _ in range(400)]
    return texts + [text.lower() for text in texts] + [f" {text}" for text in texts]


def _template_texts() -> list[str]:
    instructions = [chat_text("a red circle", task) for task in ("t2v", "i2v", "t2i", "i2i")]
    return [template.wrap(" ") for template in (VIDEO, IMAGE, IMAGE_EDIT, IMAGE_TO_VIDEO)] + instructions


class Probed(nn.Module):
    """An encoder with linear probes for the attributes on its output vector."""

    def __init__(self, encoder: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.probes = nn.ModuleDict({name: nn.Linear(dim, len(values)) for name, values in ATTRIBUTES.items()})

    def probe_loss(self, vectors: Tensor, scenes: list[Scene], said: list[str]) -> Tensor:
        """Mean cross-entropy of all attributes; a size that the text leaves out counts as none."""
        losses = []
        for name, values in ATTRIBUTES.items():
            wanted = [_stated(getattr(scene, name), text) for scene, text in zip(scenes, said, strict=True)]
            target = torch.tensor([values.index(value) for value in wanted])
            losses.append(F.cross_entropy(self.probes[name](vectors), target))
        return torch.stack(losses).mean()


def _stated(value: str | None, text: str) -> str | None:
    return value if value is not None and value in text.lower() else None


def _samples(generator: torch.Generator, count: int) -> tuple[list[Scene], list[str], list[bool]]:
    rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
    scenes = [random_scene(rng) for _ in range(count)]
    moving = [rng.random() < 0.7 for _ in scenes]
    return scenes, [varied_caption(s, rng, moving=m) for s, m in zip(scenes, moving, strict=True)], moving


class ClipObjective:
    """Attributes from the pooled output."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def __call__(self, model: Probed, step: int, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        scenes, texts, _ = _samples(generator, 64)
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        pooled = model.encoder(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return {"loss": model.probe_loss(pooled, scenes, texts)}


class QwenObjective:
    """Next token and attributes on templated captions; every fourth step the enhancer's answers instead."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def __call__(self, model: Probed, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self._enhance(model, generator) if step % 4 == 3 else self._caption(model, generator)

    def _caption(self, model: Probed, generator: torch.Generator) -> dict[str, Tensor]:
        scenes, texts, moving = _samples(generator, 16)
        prompts = [(VIDEO if m else IMAGE).wrap(t) for m, t in zip(moving, texts, strict=True)]
        ids, mask = self._tokens(prompts)
        output = model.encoder(input_ids=ids, output_hidden_states=True)
        caption_tokens = self._after_prefix(ids) & mask
        weights = caption_tokens[..., None].float()
        vectors = (output.hidden_states[-1] * weights).sum(1) / weights.sum(1)
        probes = model.probe_loss(vectors, scenes, texts)
        return {"loss": probes + 0.5 * self._next_token(output.logits, ids, caption_tokens), "probes": probes}

    def _enhance(self, model: Probed, generator: torch.Generator) -> dict[str, Tensor]:
        scenes, texts, moving = _samples(generator, 4)
        prompts, answers = [], []
        for scene, text, moves in zip(scenes, texts, moving, strict=True):
            full = scene if scene.size in text else Scene(**{**vars(scene), "size": "big"})
            prompts.append(chat_text(text, "t2v" if moves else "t2i"))
            answers.append(f"{caption(full, moving=moves)}<|im_end|>")
        ids, mask = self._tokens([p + a for p, a in zip(prompts, answers, strict=True)])
        lengths = [len(self.tokenizer(p)["input_ids"]) for p in prompts]
        answer = mask & (torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None])
        answers_loss = self._next_token(model.encoder(input_ids=ids).logits, ids, answer)
        return {"loss": answers_loss, "answers": answers_loss}

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"].bool()

    def _after_prefix(self, ids: Tensor) -> Tensor:
        """True from the first token behind `user\\n` of the last turn."""
        start = self.tokenizer.convert_tokens_to_ids("<|im_start|>")
        last = (ids == start).long().cumsum(1) == (ids == start).sum(1, keepdim=True)
        return last & (last.long().cumsum(1) > 3)

    @staticmethod
    def _next_token(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weights = counted[:, 1:].flatten().float()
        return (loss * weights).sum() / weights.sum()


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


def train_text(folder: Path) -> tuple[Path, Path]:
    """Make both encoders in `folder`; the folders of the Qwen and of the CLIP."""
    qwen_folder, clip_folder = folder / "qwen", folder / "clip"
    qwen_tokenizer = build_qwen_tokenizer(_template_texts() + language_texts(), qwen_folder)
    clip_tokenizer = build_clip_tokenizer(language_texts(), clip_folder)
    torch.manual_seed(SEED)
    clip = Probed(_clip(clip_tokenizer), CLIP_DIM)
    _finish(clip, fit(clip, ClipObjective(clip_tokenizer), CLIP, folder / "clip-run").state_dict(), clip_folder)
    torch.manual_seed(SEED)
    qwen = Probed(_qwen(qwen_tokenizer), QWEN_DIM)
    _finish(qwen, fit(qwen, QwenObjective(qwen_tokenizer), QWEN, folder / "qwen-run").state_dict(), qwen_folder)
    return qwen_folder, clip_folder
