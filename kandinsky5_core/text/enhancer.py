"""The prompt enhancer: Qwen2.5-VL rewrites a short prompt into the long captions the DiTs were trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .encoder import TextEncoder
from .templates import IMAGE_MARK, IMAGE_PAD
from .vision import limit_area, shrink, to_pil

if TYPE_CHECKING:
    import PIL.Image
    from transformers.generation.streamers import BaseStreamer

log = logging.getLogger(__name__)

SYSTEM = "You are a helpful assistant."
REPETITION_PENALTY = 1.05
EDIT_IMAGE_DIVISOR = 4
"""The official enhancer shows the source of an edit at a quarter of its width and height."""
FIRST_FRAME_AREA = 1024 * 1024
"""Pixels at which the first frame is shown; larger ones only cost time."""
PROMPTS = Path(__file__).parent / "prompts"

OnToken = Callable[[int], None]


@torch.no_grad()
def enhance(
    encoder: TextEncoder,
    prompt: str,
    *,
    task: str,
    image: torch.Tensor | None = None,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_token: OnToken | None = None,
) -> str:
    """The prompt in more words, for t2v, i2v, t2i or i2i.

    Args:
        encoder: loaded with `lm_head=True`.
        image: (H, W, 3) floats in 0..1 or uint8; the first frame for i2v, the source for i2i, None for the others.
        seed: of the draws when `temperature` is above 0.
        temperature: 0 takes the likeliest token each time, so that the seed changes nothing; the official code
            draws at 1e-6, which is the same.
        on_token: called with the number of tokens written so far; what it raises stops the writing.

    Returns:
        The new text, or `prompt` itself (with a logged warning) when the model writes nothing.

    Raises:
        ValueError: no head is loaded, the task is unknown, or the image is missing or not wanted.
    """
    if encoder.qwen.lm_head is None:
        raise ValueError("this text encoder was loaded without its head; load it with lm_head=True to enhance prompts")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must not be negative; 0 takes the likeliest token")
    pictures = _pictures(task, image)
    inputs = encoder.vision_inputs(chat_text(prompt, task), pictures)
    text = written(encoder, inputs, max_new_tokens, temperature, seed, on_token)
    if not text:
        log.warning("prompt enhancer: the model wrote no text, only the end mark; the prompt stays as it was")
        return prompt
    return text


def instruction(task: str) -> str:
    """The request for a task, with `{prompt}` where the prompt goes.

    Raises:
        ValueError: unknown task.
    """
    if task not in ("t2v", "i2v", "t2i", "i2i"):
        raise ValueError(f"unknown task '{task}'; use t2v, i2v, t2i or i2i")
    return (PROMPTS / f"{task}.txt").read_text(encoding="utf-8").strip()


def chat_text(prompt: str, task: str) -> str:
    """One user turn in Qwen's chat format, up to where the answer begins; an image mark for i2v and i2i.

    Raises:
        ValueError: unknown task, or the prompt contains an image mark.
    """
    if IMAGE_PAD in prompt:
        raise ValueError(f"the prompt contains {IMAGE_PAD}, which stands for an image; take it out")
    request = instruction(task).replace("{prompt}", prompt)
    before, after = {"i2v": (IMAGE_MARK, ""), "i2i": ("", IMAGE_MARK)}.get(task, ("", ""))
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{before}{request}{after}<|im_end|>\n"
        f"<|im_start|>assistant\n"
    )


def _pictures(task: str, image: torch.Tensor | None) -> list[PIL.Image.Image]:
    wanted = task in ("i2v", "i2i")
    if wanted and image is None:
        raise ValueError(f"enhancing a prompt for {task} needs the image; give image")
    if not wanted and image is not None:
        raise ValueError(f"enhancing a prompt for {task} takes no image; leave image out")
    if image is None:
        return []
    picture = to_pil(image)
    return [shrink(picture, EDIT_IMAGE_DIVISOR) if task == "i2i" else limit_area(picture, FIRST_FRAME_AREA)]


def written(
    encoder: TextEncoder,
    inputs: dict[str, Any],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> str:
    """What Qwen writes after `inputs` (of `TextEncoder.vision_inputs`), without special tokens."""
    stops = [encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    # transformers draws from the global generators; the fork leaves them as they were.
    with torch.random.fork_rng(devices=devices, enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(seed)
        made = encoder.qwen.generate(
            **inputs,
            **drawing,
            max_new_tokens=max_new_tokens,
            repetition_penalty=REPETITION_PENALTY,
            eos_token_id=stops,
            pad_token_id=stops[1],
            streamer=_counting_streamer(on_token) if on_token is not None else None,
        )
    ids = made[0, inputs["input_ids"].shape[1] :]
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _counting_streamer(on_token: OnToken) -> BaseStreamer:
    from transformers.generation.streamers import BaseStreamer

    class CountingStreamer(BaseStreamer):
        """Counts the tokens that follow the prompt, which `generate` puts first, all at once."""

        def __init__(self) -> None:
            self.count = -1

        def put(self, value: torch.Tensor) -> None:  # noqa: ARG002
            self.count += 1
            if self.count:
                on_token(self.count)

        def end(self) -> None:
            pass

    return CountingStreamer()
