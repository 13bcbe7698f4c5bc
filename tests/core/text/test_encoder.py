"""Conditioning against literal reference computations with the transformers models."""

import itertools
import logging

import pytest
import torch
from PIL import Image

from kandinsky5_core.text.encoder import TextEncoder
from kandinsky5_core.text.templates import EDIT_TEMPLATES, IMAGE, VIDEO
from kandinsky5_core.text.vision import make_image_processor

CAPTIONS = [
    "a big red circle moves left on a black background",
    "кошка сидит \u2014 {braces} and %s",
    "",
    "one two three four five six seven eight nine ten",
]


def reference_text(tiny, encoder, prompts, template, crop, max_tokens):
    """The rule read literally: pad to max, no mask, last hidden state, crop."""
    tokens = encoder.tokenizer(
        [template.text.replace("{}", prompt) for prompt in prompts],
        max_length=crop + max_tokens,
        truncation=True,
        padding="max_length",
        padding_side="right",
        return_tensors="pt",
    )
    with torch.no_grad():
        output = tiny.qwen_model.model(input_ids=tokens["input_ids"], output_hidden_states=True, return_dict=True)
    return output.hidden_states[-1][:, crop:], tokens["attention_mask"][:, crop:].bool()


@pytest.mark.parametrize(("task", "template"), [("t2v", VIDEO), ("i2v", VIDEO), ("t2i", IMAGE), ("i2i", IMAGE)])
@pytest.mark.parametrize("max_tokens", [256, 12])
def test_text_path_equals_the_padded_reference(tiny, encoder, task, template, max_tokens):
    crop = len(encoder.tokenizer(template.text.split("{}")[0])["input_ids"])
    made = encoder.encode(CAPTIONS, task=task, max_tokens=max_tokens)
    embeds, mask = reference_text(tiny, encoder, CAPTIONS, template, crop, max_tokens)
    assert made.embeds.shape == (4, max_tokens, 256)
    assert torch.equal(made.mask, mask)
    assert mask.sum(1).unique().numel() > 1, "the batch must be ragged for the test to mean anything"
    torch.testing.assert_close(made.embeds[mask], embeds[mask], rtol=0, atol=1e-5)
    assert not made.embeds[~mask].any()


def test_first_kept_token_is_the_first_of_the_caption(tiny, encoder):
    ids = encoder.ids("x<|im_end|>")
    made = encoder.encode(["x"], task="t2v", max_tokens=8)
    assert made.mask[0].tolist() == [index < len(ids) for index in range(8)]


def test_rows_do_not_depend_on_their_batch(encoder):
    together = encoder.encode(CAPTIONS, task="t2v", max_tokens=64)
    for index, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption], task="t2v", max_tokens=64)
        torch.testing.assert_close(together.embeds[index], alone.embeds[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.pooled[index], alone.pooled[0], rtol=0, atol=1e-5)


def test_long_prompts_are_cut_from_the_right_and_told(encoder, caplog):
    long = " ".join(CAPTIONS * 4)
    full = encoder.encode([long], task="t2i", max_tokens=512)
    with caplog.at_level(logging.WARNING):
        cut = encoder.encode([long], task="t2i", max_tokens=20)
    assert cut.mask.all()
    torch.testing.assert_close(cut.embeds, full.embeds[:, :20], rtol=0, atol=1e-5)
    assert "prompt 0 is cut" in caplog.text


def test_pooled_is_clip_at_the_end_of_the_bare_caption(tiny, encoder):
    prompts = [*CAPTIONS, " ".join(CAPTIONS * 8)]
    end = encoder.clip_tokenizer.eos_token_id
    made = encoder.encode(prompts, task="t2v", max_tokens=16).pooled
    assert made.dtype == torch.float32
    for row, prompt in zip(made, prompts, strict=True):
        inner = encoder.clip_tokenizer(prompt)["input_ids"][1:-1][:75]
        ids = torch.tensor([[encoder.clip_tokenizer.bos_token_id, *inner, end]])
        with torch.no_grad():
            expected = tiny.clip_model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


def image_of(height, width, seed):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def reference_edit(tiny, encoder, prompt, images, template):
    """Processor outputs and expanded pads into the transformers model; positions are laid out here by hand."""
    pictures = [Image.fromarray((image * 255).round().to(torch.uint8).numpy()) for image in images]
    pictures = [picture.resize((picture.width // 2, picture.height // 2)) for picture in pictures]
    made = make_image_processor(tiny.qwen_model.config.vision_config)(images=pictures, return_tensors="pt")
    grids = made["image_grid_thw"].tolist()
    marks = "".join(f"<|vision_start|>{'<|image_pad|>' * (h * w // 4)}<|vision_end|>" for _, h, w in grids)
    ids = torch.tensor([encoder.ids(template.text.replace("{}", prompt) + marks + "<|im_end|>")])
    with torch.no_grad():
        output = tiny.qwen_model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=made["pixel_values"],
            image_grid_thw=made["image_grid_thw"],
            position_ids=mrope_positions(ids[0].tolist(), grids, tiny.qwen_model.config.image_token_id),
            output_hidden_states=True,
            return_dict=True,
        )
    crop = len(encoder.ids(template.text.split("{}")[0])) + template.lost_tokens
    return output.hidden_states[-1][0, crop:]


def mrope_positions(ids, grids, image_token):
    """(3, 1, tokens): text counts on; an image's tokens share its first time, with rows and columns added."""
    columns, start, grids = [], 0, iter(grids)
    for is_image, run in itertools.groupby(ids, key=lambda token: token == image_token):
        count = len(list(run))
        if not is_image:
            columns += [(start + index,) * 3 for index in range(count)]
            start += count
            continue
        _, height, width = next(grids)
        cells = itertools.product(range(height // 2), range(width // 2))
        columns += [(start, start + row, start + column) for row, column in cells]
        start += max(height, width) // 2
    return torch.tensor(columns).T[:, None]


@pytest.mark.parametrize("edit_template", list(EDIT_TEMPLATES))
def test_edit_path_equals_the_model_with_processor_outputs(tiny, encoder, edit_template):
    prompts = ["make the circle blue", "turn it to the left, please"]
    images = [image_of(128, 192, 1), [image_of(112, 112, 2), image_of(160, 128, 3)]]
    made = encoder.encode(prompts, task="i2i", max_tokens=512, images=images, edit_template=edit_template)
    for index, (prompt, entry) in enumerate(zip(prompts, images, strict=True)):
        row_images = [entry] if isinstance(entry, torch.Tensor) else entry
        expected = reference_edit(tiny, encoder, prompt, row_images, EDIT_TEMPLATES[edit_template])
        assert made.mask[index].sum() == len(expected)
        torch.testing.assert_close(made.embeds[index, : len(expected)], expected, rtol=0, atol=1e-5)
        assert not made.embeds[index, len(expected) :].any()
    assert made.mask.any(0).all(), "padded no further than the longest row"


def test_edit_path_sees_the_image_and_takes_bytes_too(encoder):
    image = image_of(112, 112, 4)
    byte_image = (image * 255).round().to(torch.uint8)
    floats, given, other = (
        encoder.encode(["recolor"], task="i2i", max_tokens=512, images=[picture]).embeds
        for picture in (image, byte_image, image_of(112, 112, 5))
    )
    assert torch.equal(floats, given)
    assert (floats - other).abs().max() > 1e-2


def test_text_after_an_edit_is_as_before_it(encoder):
    before = encoder.encode(CAPTIONS, task="t2v", max_tokens=64)
    encoder.encode(["recolor"], task="i2i", max_tokens=64, images=[image_of(112, 168, 6)])
    after = encoder.encode(CAPTIONS, task="t2v", max_tokens=64)
    assert torch.equal(before.embeds, after.embeds)


def test_image_processor_has_the_released_limits(encoder):
    processor = make_image_processor(encoder.qwen.config.vision_config)
    grid = processor(images=[Image.new("RGB", (512, 512))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 36, 36]]
    grid = processor(images=[Image.new("RGB", (10, 20))], return_tensors="pt")["image_grid_thw"]
    assert (grid.prod() * 14 * 14) >= 3136
    grid = processor(images=[Image.new("RGB", (1400, 1120))], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 80, 100]], "1.5 megapixels are far below the limit"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"task": "v2v"}, "unknown task 'v2v'"),
        ({"images": [torch.zeros(8, 8, 3)]}, "'t2v' takes no images"),
        ({"task": "i2i", "images": []}, "0 entries for 1 prompts"),
        ({"task": "i2i", "images": [[]]}, "holds no image"),
        ({"task": "i2i", "images": [torch.zeros(3, 64, 64)]}, r"shape \(3, 64, 64\)"),
        ({"task": "i2i", "images": [torch.full((64, 64, 3), 2.0)]}, "between 0 and 1"),
        ({"task": "i2i", "images": [torch.zeros(64, 64, 3)], "prompts": ["<|image_pad|>"]}, "stands for an image"),
    ],
)
def test_bad_requests_are_named(encoder, arguments, words):
    with pytest.raises(ValueError, match=words):
        encoder.encode(**{"prompts": ["a"], "task": "t2v", "max_tokens": 16, **arguments})


def test_to_keeps_dtypes(encoder):
    assert isinstance(encoder.to("cpu"), TextEncoder)
    assert encoder.device == torch.device("cpu")
    assert {parameter.dtype for parameter in encoder.clip.parameters()} == {torch.float32}
