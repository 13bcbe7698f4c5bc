"""Finding and opening the two tokenizers: a named folder, ComfyUI's own copy, or the hub."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .templates import VIDEO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
QWEN_SPECIAL = (
    END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
)  # fmt: skip
"""Special tokens that a Qwen tokenizer must have."""
RELEASED_VOCABULARY = 150_000
"""Embedding tables with more rows than this are those of a released Qwen, whose tokenizer is known."""


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """Where one of the two tokenizers is to be had."""

    words: str
    argument: str
    """The argument of `load_text_encoder` that names its folder."""
    comfyui_folder: str
    """Inside an installed ComfyUI."""
    repo: str
    defaults: tuple[tuple[str, str], ...]
    """Special tokens by role, where the folder does not say."""


QWEN = TokenizerKind(
    words="Qwen2.5-VL",
    argument="qwen_tokenizer",
    comfyui_folder="comfy/text_encoders/qwen25_tokenizer",
    repo="Qwen/Qwen2.5-VL-7B-Instruct",
    defaults=(("eos_token", "<|im_end|>"), ("pad_token", END_OF_TEXT)),
)
CLIP = TokenizerKind(
    words="CLIP",
    argument="clip_tokenizer",
    comfyui_folder="comfy/sd1_tokenizer",
    repo="openai/clip-vit-large-patch14",
    defaults=(("bos_token", "<|startoftext|>"), ("eos_token", END_OF_TEXT), ("pad_token", END_OF_TEXT)),
)


def load_tokenizer(
    kind: TokenizerKind,
    *,
    folder: Path | str | None = None,
    beside: Path | str | None = None,
    comfyui: Path | str | None = None,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer from the first of these that is there.

    Args:
        folder: named by the user; must hold one.
        beside: the weights' file or folder; its folder, or `tokenizer*` next to that, may hold one.
        comfyui: root of an installed ComfyUI, which carries both.
        local_files_only: never ask the hub, only its cache on this machine.

    Raises:
        ValueError: `folder` or `comfyui` holds none, or nothing was found and the hub is out of reach.
    """
    if folder is not None:
        return _open_folder(kind, _holding(kind, Path(folder), kind.argument))
    for near in _near(beside) if beside is not None else ():
        if _holds_tokenizer(near):
            return _open_folder(kind, near)
    if comfyui is not None:
        return _open_folder(kind, _holding(kind, Path(comfyui) / kind.comfyui_folder, "comfyui"))
    return _open_folder(kind, _from_hub(kind, local_files_only))


def check_qwen_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that is not the one a Qwen model with `rows` embeddings was made with.

    Raises:
        ValueError: special tokens are missing, ids exceed the table, or the template has another length.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in QWEN_SPECIAL if token not in vocabulary]
    if missing:
        raise ValueError(f"the Qwen tokenizer has no {missing[0]}; name a Qwen2.5 tokenizer with {QWEN.argument}")
    _check_ids(QWEN, vocabulary, rows)
    count = len(tokenizer(VIDEO.prefix)["input_ids"])
    if rows > RELEASED_VOCABULARY and count != VIDEO.crop:
        raise ValueError(
            f"the tokenizer splits the video template into {count} tokens, Qwen2.5's into {VIDEO.crop}; "
            f"name a Qwen2.5 tokenizer with {QWEN.argument}"
        )


def check_clip_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer whose ids are not in a CLIP model with `rows` embeddings, or that ends no text.

    Raises:
        ValueError: says what is wrong.
    """
    _check_ids(CLIP, tokenizer.get_vocab(), rows)
    if tokenizer.eos_token_id not in tokenizer("")["input_ids"]:
        raise ValueError(f"the CLIP tokenizer ends no text with {tokenizer.eos_token}; name another: {CLIP.argument}")


def _check_ids(kind: TokenizerKind, vocabulary: dict[str, int], rows: int) -> None:
    if max(vocabulary.values()) >= rows:
        raise ValueError(
            f"the {kind.words} tokenizer has ids up to {max(vocabulary.values())}, the model {rows} embeddings; "
            f"name the model's own tokenizer with {kind.argument}"
        )


def _holds_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json",), ("vocab.json", "merges.txt")
    return any(all((folder / name).is_file() for name in group) for group in names)


def _holding(kind: TokenizerKind, folder: Path, argument: str) -> Path:
    if not _holds_tokenizer(folder):
        state = "has no tokenizer.json, nor vocab.json and merges.txt" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{argument}: {folder} {state}; expected the {kind.words} tokenizer there")
    return folder


def _near(weights: Path | str) -> list[Path]:
    path = Path(weights)
    folder = path if path.is_dir() else path.parent
    # A diffusers pipeline keeps text_encoder_2 and tokenizer_2 side by side.
    return [folder, folder / "tokenizer", folder.parent / folder.name.replace("text_encoder", "tokenizer")]


def _from_hub(kind: TokenizerKind, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(kind.repo, "tokenizer_config.json", local_files_only=local_files_only)
        file = hf_hub_download(kind.repo, "tokenizer.json", local_files_only=local_files_only)
    except Exception as error:  # The hub's client raises many unrelated types when it cannot be reached.
        why = "is not in the local cache" if local_files_only else f"cannot be fetched ({type(error).__name__})"
        raise ValueError(
            f"the {kind.words} tokenizer {why}: name its folder with {kind.argument}, or an installed ComfyUI "
            f"with comfyui, or fetch {kind.repo} once while online"
        ) from error
    log.info("%s tokenizer: from the hub, %s", kind.words, kind.repo)
    return Path(file).parent


def _open_folder(kind: TokenizerKind, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    special = _special_tokens(kind, folder)
    try:
        if (folder / "tokenizer.json").is_file():
            # Not AutoTokenizer: some versions rebuild the splitting rules of a known class and ignore the file's.
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        maker = Qwen2Tokenizer if kind is QWEN else CLIPTokenizer
        return maker.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare Exception for a malformed file.
        raise ValueError(f"{folder}: its tokenizer files do not open ({error}); get them again") from error


def _special_tokens(kind: TokenizerKind, folder: Path) -> dict[str, str]:
    special = dict(kind.defaults)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = _read_json(folder / name) if (folder / name).is_file() else {}
        for role in special:
            value = values.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            special[role] = text if isinstance(text, str) else special[role]
    return special


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error}); get it again") from error
