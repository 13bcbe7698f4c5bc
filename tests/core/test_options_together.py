"""Options at random, together: each set against the plain path, with LoRA, batches, every task, and after a cancel."""

import random
from dataclasses import replace

import pytest
import torch

from kandinsky5_core import Models, Request, generate, load
from kandinsky5_core.memory.options import MemoryOptions
from kandinsky5_core.nano.drawing import Trajectory, draw
from kandinsky5_core.nano.language import parse

PROMPT = "a big red circle moves left on a black background"
STEPS = 4
EQUAL, ROUNDED, NEAR = "equal", "rounded", "near"
MEAN_DIFFERENCE = {ROUNDED: 2e-3, NEAR: 0.06}
"""Of frames in [0, 1]."""
MEMORY = (
    (EQUAL, {}), (EQUAL, {"offload": "none"}), (EQUAL, {"swap_blocks": 1}), (EQUAL, {"swap_blocks": 4}),
    (NEAR, {"weights": "int8"}), (NEAR, {"weights": "fp8", "swap_blocks": 2}), (NEAR, {"text_weights": "int8"}),
)  # fmt: skip
SPEED = (
    (EQUAL, {}), (EQUAL, {"cache": "magcache", "cache_threshold": 0.0}), (EQUAL, {"attention_engine": "sdpa"}),
    (ROUNDED, {"batch_guidance": "on"}), (NEAR, {"cache": "magcache", "cache_retain": 0.3}),
)  # fmt: skip
PICTURE = draw(parse(PROMPT), Trajectory(start=(40.0, 30.0), end=(20.0, 30.0), radius=12.0), 1, (64, 64))[0]
TASKS = (
    ("nano-video", {"task": "t2v"}), ("nano-video", {"task": "t2v", "batch": 2}),
    ("nano-video", {"task": "t2v", "attention": "nabla"}), ("nano-video", {"task": "t2v", "sampler": "heun"}),
    ("nano-video", {"task": "i2v", "image": PICTURE}), ("nano-video", {"task": "t2v", "guidance_scale": 1.0}),
    ("nano-image", {"task": "t2i", "batch": 2}),
    ("nano-edit", {"task": "i2i", "prompt": "make the circle blue", "image": PICTURE}),
)  # fmt: skip


def with_lora(models: Models) -> Models:
    """Random matrices added to two layers of each visual block: merged, as the loaders do it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in models.dit.visual_transformer_blocks:
            for layer in (block.self_attention.to_query, block.feed_forward.in_layer):
                down = torch.randn(2, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, 2, generator=generator)
                layer.weight += 0.01 * up @ down
    return models


class Cancelled(Exception):  # noqa: N818 - not an error
    """As a user presses it."""


def cancel(_step: object, *_rest: object) -> None:
    raise Cancelled


@pytest.mark.parametrize("seed", range(14))
def test_options_at_random_stay_with_the_plain_path(seed: int) -> None:
    rng = random.Random(seed)
    name, task = TASKS[seed % len(TASKS)]
    (memory_class, memory), (speed_class, speed) = rng.choice(MEMORY), rng.choice(SPEED)
    lora = "weights" not in memory and rng.random() < 0.5
    told = f"{name} {task.keys()} {memory} {speed} lora {lora}"
    request = Request(**{"prompt": PROMPT, "seed": seed, "num_steps": STEPS, **task})
    plain_models, models = load(name), load(name, memory=MemoryOptions(**memory))
    if lora:
        plain_models, models = with_lora(plain_models), with_lora(models)
    plain = generate(plain_models, request).frames
    wanted = replace(request, **speed)
    with pytest.raises(Cancelled):
        generate(models, wanted, cancel)
    result = generate(models, wanted)
    assert result.frames.shape == plain.shape
    classes = {memory_class, speed_class}
    if classes == {EQUAL}:
        assert torch.equal(result.frames, plain), told
    else:
        limit = MEAN_DIFFERENCE[NEAR if NEAR in classes else ROUNDED]
        assert (result.frames - plain).abs().mean() < limit, told
    assert torch.equal(generate(models, wanted).frames, result.frames), told


def test_fifty_runs_leave_memory_where_it_was() -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    models = load("nano-video", memory=MemoryOptions(swap_blocks=2, weights="int8"))
    request = Request(prompt=PROMPT, num_steps=2, cache="magcache", batch_guidance="on")
    held = []
    for number in range(50):
        generate(models, replace(request, seed=number, task="t2i" if number % 2 else "t2v"))
        held.append(process.memory_info().rss)
    # After ten runs allocators have what they need.
    assert max(held[-10:]) - max(held[10:20]) < 24 * 2**20, [value // 2**20 for value in held]
