"""Prompts to conditioning: hidden states of Qwen2.5-VL and the pooled vector of CLIP.

B is the batch, L the number of text tokens kept, D and P the widths of Qwen and CLIP (3584 and 768 as released).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..conditioning import TextConditioning
from . import tokenizers
from .clip import load_clip
from .loading import KeepStored, Quantise
from .qwen import load_qwen
from .templates import IMAGE_PAD, Template, template_for
from .vision import QwenImages, make_image_processor, prepare_images, shrink, to_pil

if TYPE_CHECKING:
    import PIL.Image
    from transformers import CLIPTextModel, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

log = logging.getLogger(__name__)

EDIT_IMAGE_DIVISOR = 2
"""Qwen sees the source of an edit at half its width and height."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """Both text encoders with their tokenizers. All sizes come from the models."""

    qwen: Qwen2_5_VLForConditionalGeneration
    """`qwen.lm_head` is None unless loaded for the prompt enhancer."""
    clip: CLIPTextModel
    tokenizer: PreTrainedTokenizerBase
    """Of Qwen."""
    clip_tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.qwen.device

    def to(self, device: torch.device | str) -> TextEncoder:
        """Both models moved to `device`, in place; dtypes stay (CLIP is fp32)."""
        self.qwen.to(device)
        self.clip.to(device)
        return self

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        *,
        task: str,
        max_tokens: int,
        images: Sequence[torch.Tensor | Sequence[torch.Tensor]] | None = None,
        edit_template: str = "snapshot",
    ) -> TextConditioning:
        """Conditioning for a batch of prompts, on the models' device.

        Args:
            task: t2v, i2v, t2i or i2i; picks the template.
            max_tokens: Qwen tokens kept after the template (L); longer prompts are cut from the right.
            images: for i2i, one image, or several, for each prompt: (H, W, 3) floats in 0..1 or uint8, cropped to
                the output size. Then nothing is cut or padded but to the longest row: L is caption plus image tokens.
            edit_template: a name of `EDIT_TEMPLATES`.

        Returns:
            embeds (B, L, D) in Qwen's dtype, zeros where `mask` is False. The official code has hidden states of
            padding there; masked keys make both the same to the DiT.

        Raises:
            ValueError: bad task or template, images that do not fit, or an empty batch.
        """
        if not prompts:
            raise ValueError("prompts is empty; give at least one (it may be the empty string)")
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be at least 1")
        template = template_for(task, with_images=images is not None, edit_template=edit_template)
        if images is None:
            embeds, mask = self._encode_texts(prompts, template, max_tokens)
        else:
            embeds, mask = self._encode_edits(prompts, template, _image_lists(images, len(prompts)))
        return TextConditioning(embeds=embeds, pooled=self.pooled(prompts), mask=mask)

    @torch.no_grad()
    def pooled(self, prompts: Sequence[str]) -> torch.Tensor:
        """(B, P) float32: CLIP's final hidden state at the end of each bare caption, cut to its 77 tokens."""
        length = self.clip.config.max_position_embeddings
        tokens = self.clip_tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return self.clip(input_ids=tokens["input_ids"].to(self.device)).pooler_output

    def crop_of(self, template: Template) -> int:
        """Tokens that `template` drops: its `crop` with the released tokenizer, as much of the text with another."""
        return len(self.ids(template.prefix)) + template.lost_tokens

    def ids(self, text: str) -> list[int]:
        """Qwen token ids of `text` as it stands; special tokens are those written in it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_texts(
        self, prompts: Sequence[str], template: Template, max_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        crop = self.crop_of(template)
        rows = [self.ids(template.wrap(prompt)) for prompt in prompts]
        _log_cuts(rows, crop + max_tokens)
        rows = [torch.tensor(row[: crop + max_tokens]) for row in rows]
        # Attention is causal and padding on the right, so neither a mask nor more than the longest row is needed.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        hidden = self.qwen.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return _padded([hidden[index, crop : len(row)] for index, row in enumerate(rows)], max_tokens)

    def _encode_edits(
        self, prompts: Sequence[str], template: Template, images: list[list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        crop = self.crop_of(template)
        rows = []
        for prompt, row_images in zip(prompts, images, strict=True):
            pictures = [shrink(to_pil(image), EDIT_IMAGE_DIVISOR) for image in row_images]
            inputs = self.vision_inputs(template.wrap(_without_marks(prompt), len(pictures)), pictures)
            rows.append(self.qwen.model(**inputs, use_cache=False).last_hidden_state[0, crop:])
        return _padded(rows, max(len(row) for row in rows))

    def vision_inputs(self, text: str, pictures: list[PIL.Image.Image]) -> dict[str, Any]:
        """Arguments for Qwen's forward or generate: `text` has one image pad for each picture.

        Raises:
            ValueError: the loaded Qwen has no vision tower.
        """
        if not pictures:
            ids = torch.tensor([self.ids(text)], device=self.device)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.qwen.model.visual is None:
            raise ValueError("the loaded Qwen has no vision tower, so it takes no images; load a file that has one")
        images = prepare_images(make_image_processor(self.qwen.config.vision_config), pictures)
        return self._with_images(_repeat_pads(text, images), images)

    def _with_images(self, text: str, images: QwenImages) -> dict[str, Any]:
        ids = torch.tensor([self.ids(text)], device=self.device)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": images.pixel_values.to(self.device),
            "image_grid_thw": images.grid_thw.to(self.device),
        }
        if "mm_token_type_ids" in inspect.signature(self.qwen.model.forward).parameters:
            # transformers 5 asks for it to lay out image positions; earlier versions find them by themselves.
            inputs["mm_token_type_ids"] = (ids == self.qwen.config.image_token_id).int()
        return inputs


def load_text_encoder(
    qwen: Path | str,
    clip: Path | str,
    *,
    qwen_tokenizer: Path | str | None = None,
    clip_tokenizer: Path | str | None = None,
    comfyui: Path | str | None = None,
    lm_head: bool = False,
    local_files_only: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantise: Quantise | None = None,
    keep_stored: KeepStored | None = None,
) -> TextEncoder:
    """Both text encoders from HF folders or from single files (`qwen_2.5_vl_7b*.safetensors`, `clip_l.safetensors`).

    Args:
        qwen_tokenizer, clip_tokenizer: folders of the tokenizers. Left out, they are looked for beside the weights,
            then in ComfyUI's own copy, then at the hub.
        comfyui: root of an installed ComfyUI.
        lm_head: also load Qwen's head, for the prompt enhancer.
        local_files_only: never ask the hub.
        dtype: of Qwen's weights in memory; None keeps the file's. CLIP is always float32.
        quantise: what to put in the place of each linear layer of Qwen's language model as it is read.
        keep_stored: what to put in the place of Qwen's linear layers that are fp8 or int8 in the file; None
            widens them.

    Raises:
        ValueError: a file or tokenizer is missing, foreign or does not fit; says which argument to change.
    """
    words = tokenizers.load_tokenizer(
        tokenizers.QWEN, folder=qwen_tokenizer, beside=qwen, comfyui=comfyui, local_files_only=local_files_only
    )
    clip_words = tokenizers.load_tokenizer(
        tokenizers.CLIP, folder=clip_tokenizer, beside=clip, comfyui=comfyui, local_files_only=local_files_only
    )
    layers = {"quantise": quantise, "keep_stored": keep_stored}
    qwen_model = load_qwen(qwen, lm_head=lm_head, device=device, dtype=dtype, **layers)
    tokenizers.check_qwen_tokenizer(words, qwen_model.get_input_embeddings().num_embeddings)
    _set_image_token(qwen_model, words)
    clip_model = load_clip(clip, eos_token_id=clip_words.eos_token_id, device=device)
    tokenizers.check_clip_tokenizer(clip_words, clip_model.config.vocab_size)
    return TextEncoder(qwen=qwen_model, clip=clip_model, tokenizer=words, clip_tokenizer=clip_words)


def _set_image_token(qwen: Qwen2_5_VLForConditionalGeneration, words: PreTrainedTokenizerBase) -> None:
    # The config of a small model may still name the released ids, which its own tokenizer does not use.
    for name, token in (
        ("image_token_id", IMAGE_PAD),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        setattr(qwen.config, name, words.convert_tokens_to_ids(token))


def _padded(rows: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeds = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    return embeds, torch.arange(length, device=embeds.device) < lengths[:, None]


def _log_cuts(rows: Sequence[Sequence[int]], limit: int) -> None:
    for index, row in enumerate(rows):
        if len(row) > limit:
            log.warning("prompt %d is cut: its last %d of %d tokens do not fit", index, len(row) - limit, len(row))


def _image_lists(images: Sequence[torch.Tensor | Sequence[torch.Tensor]], num_prompts: int) -> list[list[torch.Tensor]]:
    if len(images) != num_prompts:
        raise ValueError(f"images has {len(images)} entries for {num_prompts} prompts; give one entry for each prompt")
    lists = [[entry] if isinstance(entry, torch.Tensor) else list(entry) for entry in images]
    if not all(lists):
        raise ValueError("an entry of images holds no image; give at least one for each prompt, or images=None")
    return lists


def _without_marks(prompt: str) -> str:
    if IMAGE_PAD in prompt:
        raise ValueError(f"the prompt contains {IMAGE_PAD}, which stands for an image; take it out")
    return prompt


def _repeat_pads(text: str, images: QwenImages) -> str:
    pieces = text.split(IMAGE_PAD)
    assert len(pieces) == len(images.num_tokens) + 1
    pads = [IMAGE_PAD * count for count in images.num_tokens]
    return "".join(piece + pad for piece, pad in zip(pieces, [*pads, ""], strict=True))
