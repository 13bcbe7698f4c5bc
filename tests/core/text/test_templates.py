"""Templates byte for byte, against the check values of the release."""

import hashlib
import inspect

import pytest

from kandinsky5_core.text import tokenizers
from kandinsky5_core.text.templates import (
    EDIT_TEMPLATES,
    IMAGE,
    IMAGE_EDIT,
    IMAGE_TO_VIDEO,
    VIDEO,
    template_for,
)


@pytest.mark.parametrize(
    ("template", "length", "digest", "crop"),
    [
        (VIDEO, 669, "09efacd0c7584e23", 129),
        (IMAGE, 218, "04de998d6e835997", 41),
        (IMAGE_EDIT, 266, "8cd783f4ed62c3dd", 55),
        (IMAGE_TO_VIDEO, 698, "34c9ab571d1bc007", 132),
    ],
)
def test_templates_are_those_of_the_release(template, length, digest, crop):
    assert len(template.text) == length
    assert hashlib.sha256(template.text.encode()).hexdigest().startswith(digest)
    assert template.crop == crop
    assert template.text.count("{}") == 1


def test_edit_templates_close_after_the_images():
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    two = IMAGE_EDIT.wrap("make {it} red", 2)
    assert two == IMAGE_EDIT.text.replace("{}", "make {it} red") + mark + mark + "<|im_end|>"
    one_line = EDIT_TEMPLATES["one-line"]
    assert one_line.crop == 55
    assert one_line.wrap("c", 1).endswith(f"target image:<|im_end|><|im_start|>userc{mark}<|im_end|>")
    assert one_line.text.replace("promt", "prompt") == EDIT_TEMPLATES["diffusers"].text


def test_diffusers_edit_template_is_the_one_in_diffusers():
    module = pytest.importorskip("diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2i")
    source = inspect.getsource(module)
    assert EDIT_TEMPLATES["diffusers"].wrap("{}", 1).replace("\n", "\\n") in source
    assert f"prompt_template_encode_start_idx = {EDIT_TEMPLATES['diffusers'].crop}\n" in source


def test_tasks_take_the_template_they_were_trained_with():
    assert template_for("t2v") is VIDEO
    assert template_for("i2v") is VIDEO
    assert template_for("t2i") is IMAGE
    assert template_for("i2i") is IMAGE
    assert template_for("i2i", with_images=True) is IMAGE_EDIT
    assert template_for("i2i", with_images=True, edit_template="diffusers").crop == 54


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="unknown task 'video'"):
        template_for("video")
    with pytest.raises(ValueError, match="snapshot, one-line, diffusers"):
        template_for("i2i", with_images=True, edit_template="old")
    with pytest.raises(ValueError, match="'t2v' takes no images"):
        template_for("t2v", with_images=True)


def test_crops_equal_the_prefix_under_the_real_tokenizer():
    try:
        tokenizer = tokenizers.load_tokenizer(tokenizers.QWEN, local_files_only=True)
    except ValueError as error:
        pytest.skip(str(error))
    for template in (VIDEO, IMAGE, IMAGE_TO_VIDEO, *EDIT_TEMPLATES.values()):
        assert len(tokenizer(template.prefix)["input_ids"]) + template.lost_tokens == template.crop
