"""The prompt enhancer: greedy writing with the model's own head."""

import logging

import pytest
import torch
from PIL import Image

from kandinsky5_core.text.encoder import load_text_encoder
from kandinsky5_core.text.enhancer import FIRST_FRAME_AREA, chat_text, enhance, instruction
from kandinsky5_core.text.vision import limit_area, make_image_processor

IMAGE = torch.zeros(56, 56, 3)


def reference_greedy(tiny, ids, count, stops):
    """Greedy with repetition penalty 1.05 over prompt and answer, each step a whole forward."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = tiny.qwen_model(input_ids=torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.05, logits[seen] * 1.05)
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids[start:]


@pytest.mark.parametrize("task", ["t2v", "t2i"])
def test_writes_what_greedy_decoding_writes(tiny, encoder, task):
    prompt = "a red circle"
    stops = [encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    expected = reference_greedy(tiny, encoder.ids(chat_text(prompt, task)), 6, stops)
    counts = []
    made = enhance(encoder, prompt, task=task, seed=1, max_new_tokens=6, on_token=counts.append)
    assert made == encoder.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert made
    assert counts == list(range(1, len(expected) + 1))


@pytest.mark.parametrize(("task", "grid"), [("i2v", [1, 16, 24]), ("i2i", [1, 4, 6])])
def test_shows_the_image_at_its_size(encoder, monkeypatch, task, grid):
    image = torch.randint(0, 256, (224, 336, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    given = {}
    generate = encoder.qwen.generate
    monkeypatch.setattr(encoder.qwen, "generate", lambda **inputs: given.update(inputs) or generate(**inputs))
    enhance(encoder, "it moves", task=task, image=image, seed=1, max_new_tokens=2)
    picture = Image.fromarray(image.numpy())
    picture = picture if task == "i2v" else picture.resize((336 // 4, 224 // 4))
    processor = make_image_processor(encoder.qwen.config.vision_config)
    assert torch.equal(given["pixel_values"], processor(images=[picture], return_tensors="pt")["pixel_values"])
    assert given["image_grid_thw"].tolist() == [grid]
    pads = given["input_ids"] == encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pads.sum() == grid[1] * grid[2] / 4


def test_large_first_frames_are_shown_smaller(encoder):
    picture = limit_area(Image.new("RGB", (3000, 1500)), FIRST_FRAME_AREA)
    assert abs(picture.width * picture.height / FIRST_FRAME_AREA - 1) < 0.01
    assert picture.width == 2 * picture.height
    assert limit_area(Image.new("RGB", (640, 480)), FIRST_FRAME_AREA).size == (640, 480)


def test_seed_counts_only_when_drawing(encoder):
    def write(seed, temperature):
        return enhance(encoder, "a", task="t2v", seed=seed, max_new_tokens=8, temperature=temperature)

    state = torch.random.get_rng_state()
    assert write(1, 0.0) == write(2, 0.0)
    assert write(1, 2.0) == write(1, 2.0)
    assert write(1, 2.0) != write(2, 2.0)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"


def test_chat_has_one_user_turn_and_the_image_where_it_belongs():
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    for task, before, after in (("t2v", "", ""), ("t2i", "", ""), ("i2v", mark, ""), ("i2i", "", mark)):
        request = instruction(task).replace("{prompt}", "my {prompt}")
        assert chat_text("my {prompt}", task) == start + before + request + after + end


def test_instructions_hold_the_prompt_once_and_differ():
    texts = [instruction(task) for task in ("t2v", "i2v", "t2i", "i2i")]
    assert all(text.count('"{prompt}"') == 1 for text in texts)
    assert len(set(texts)) == 4
    assert all("CAPITAL LETTERS" in instruction(task) for task in ("t2i", "i2i"))


def test_no_text_keeps_the_prompt_and_says_so(tiny, caplog):
    encoder = load_text_encoder(tiny.qwen, tiny.clip, lm_head=True, local_files_only=True)
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoder.qwen.lm_head = _EndHead(encoder.qwen.lm_head.weight.shape[0], end)
    with caplog.at_level(logging.WARNING):
        assert enhance(encoder, "a red circle", task="t2v") == "a red circle"
    assert "wrote no text" in caplog.text


class _EndHead(torch.nn.Module):
    def __init__(self, rows, end):
        super().__init__()
        self.logits = torch.zeros(rows)
        self.logits[end] = 1000.0

    def forward(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_what_on_token_raises_stops_the_writing(encoder):
    def stop(count):
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enhance(encoder, "a", task="t2v", on_token=stop)


def test_bad_requests_are_named(tiny, encoder):
    headless = load_text_encoder(tiny.qwen, tiny.clip, local_files_only=True)
    with pytest.raises(ValueError, match="lm_head=True"):
        enhance(headless, "a", task="t2v")
    with pytest.raises(ValueError, match="needs the image"):
        enhance(encoder, "a", task="i2v")
    with pytest.raises(ValueError, match="takes no image"):
        enhance(encoder, "a", task="t2v", image=IMAGE)
    with pytest.raises(ValueError, match="unknown task"):
        enhance(encoder, "a", task="v2v")
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        enhance(encoder, "a", task="t2v", max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature -1"):
        enhance(encoder, "a", task="t2v", temperature=-1)
    with pytest.raises(ValueError, match="stands for an image"):
        enhance(encoder, "<|image_pad|>", task="t2v")
