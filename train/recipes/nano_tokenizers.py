"""Tokenizers of the Nano text encoders: byte-level BPE in the manner of Qwen2.5, word-level BPE in that of CLIP.

The Qwen-like one is trained to exhaustion on the prompt templates and the Nano language, so that it cuts the
templates into exactly as many tokens as the real one does: 129, 41, 132 and 52 before the caption. The code
that crops them then needs no case of its own for the Nano models.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPLIT_WORDS = {
    " promt": " prom\nt", " scren": " scre\nn", " dynamism": " dynam\nism", " postprocessing": " post\nprocessing",
}  # fmt: skip
"""Words of the templates that the real tokenizer cuts in two: never learned whole."""


def build_qwen_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train on `texts`, with every word of them one token, and save into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for typo, pieces in SPLIT_WORDS.items():
        texts = [text.replace(typo, pieces) for text in texts]
    for special in QWEN_SPECIAL:
        texts = [text.replace(special, "\n\n\n") for text in texts]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=20_000, min_frequency=0, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right"
    )
    wrapped.save_pretrained(folder)
    return wrapped


def build_clip_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train on `texts`, lower case, and save into `folder`; adds the start and end tokens itself."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2_000, min_frequency=0, show_progress=False, end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
        ),
    )  # fmt: skip
    start, end = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        unk_token="<|endoftext|>", model_max_length=77, padding_side="right",
    )  # fmt: skip
    wrapped.save_pretrained(folder)
    return wrapped
