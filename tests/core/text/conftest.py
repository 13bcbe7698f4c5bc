"""Tiny random text encoders of the transformers classes, saved the way real ones are."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kandinsky5_core.text.templates import EDIT_TEMPLATES, IMAGE, VIDEO
from kandinsky5_core.text.tokenizers import QWEN_SPECIAL

CAPTIONS = [
    "a big red circle moves left on a black background",
    "A small blue square stays still, on a gray background.",
    "кошка сидит на подоконнике and watches the rain \u2014 quietly, for a long time indeed",
    "x",
]


def byte_level_bpe(special: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [VIDEO.text, IMAGE.text, *(template.text for template in EDIT_TEMPLATES.values()), *CAPTIONS]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part of the model is felt in its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = 1 + 0.1 * noise if "norm" in name and "weight" in name else noise * scale * 3


def tiny_qwen_config(vocab_size: int, **changes):
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": vocab_size, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 128000,
        "use_sliding_window": False,
    }  # fmt: skip
    vision = {
        "depth": 8, "hidden_size": 80, "num_heads": 1, "intermediate_size": 48, "out_hidden_size": 256,
        "fullatt_block_indexes": [7], "tokens_per_second": 2,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **changes)


def save_model(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """Folders `qwen` and `clip` (weights, config, tokenizer), and the reference models with the same weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLForConditionalGeneration

    root = tmp_path_factory.mktemp("text")
    words = byte_level_bpe([*QWEN_SPECIAL, "<|video_pad|>"], 420)
    ids = {
        f"{name}_token_id": words.token_to_id(token)
        for name, token in (
            ("image", "<|image_pad|>"), ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"),
        )
    }  # fmt: skip
    qwen = Qwen2_5_VLForConditionalGeneration(tiny_qwen_config(words.get_vocab_size(), **ids)).eval()
    randomise(qwen, 1)
    save_model(qwen, root / "qwen")
    words.save(str(root / "qwen" / "tokenizer.json"))

    clip_words = byte_level_bpe(["<|startoftext|>", "<|endoftext|>"], 330)
    start, end = (clip_words.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    clip_words.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)]
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words.get_vocab_size(),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=77,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).eval()
    randomise(clip, 2)
    save_model(clip, root / "clip")
    clip_words.save(str(root / "clip" / "tokenizer.json"))
    return SimpleNamespace(root=root, qwen=root / "qwen", clip=root / "clip", qwen_model=qwen, clip_model=clip)


@pytest.fixture(scope="session")
def encoder(tiny):
    from kandinsky5_core.text.encoder import load_text_encoder

    return load_text_encoder(tiny.qwen, tiny.clip, lm_head=True, local_files_only=True)
