"""The chat templates that captions are wrapped in before Qwen2.5-VL reads them, byte for byte.

The released DiTs were trained on hidden states of these exact texts, so their spelling ("promt", "scren") stays.
After encoding, the tokens up to the caption are cropped away; the edit templates were cropped a little further, so
that the first caption tokens are lost too, and the models know it no other way.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_PAD = "<|image_pad|>"
IMAGE_MARK = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
"""What stands for one image; the pad is repeated once per image token."""

_CAMERA = "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.\n"
_STYLE = (
    "Name the visual style of the video: whether it is a professional footage, user generated content, some kind of "
    "animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.\n"
    "Pay attention to the order of key actions shown in the scene."
)
_EDIT = (
    "Based on the provided source image (first image) and target image (second image), create an interesting text "
    "prompt that can be used together with the source image to create the target image:"
)


@dataclass(frozen=True, kw_only=True)
class Template:
    """One template: `text` with `{}` where the caption goes."""

    name: str
    text: str
    crop: int
    """Tokens dropped from the front, as the released tokenizer counts them."""
    lost_tokens: int = 0
    """How many of those come after `{}`: first tokens of the caption."""
    closing: str = ""
    """Follows the image marks; the templates without images have it in `text`."""

    @property
    def prefix(self) -> str:
        """The text before the caption: `crop - lost_tokens` tokens."""
        return self.text.split("{}")[0]

    def wrap(self, caption: str, num_images: int = 0) -> str:
        """The whole text for one caption, with a mark for each image."""
        return self.text.replace("{}", caption, 1) + IMAGE_MARK * num_images + self.closing


def _chat(system: str, closing: str = "<|im_end|>") -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{}}{closing}"


VIDEO = Template(
    name="video",
    crop=129,
    text=_chat(
        "You are a promt engineer. Describe the video in detail.\n" + _CAMERA + "Describe the location of the video, "
        "main characters or objects and their action.\n"
        "Describe the dynamism of the video and presented actions.\n" + _STYLE
    ),
)
IMAGE = Template(
    name="image",
    crop=41,
    text=_chat(
        "You are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:"
    ),
)
IMAGE_EDIT = Template(
    name="image_edit",
    crop=55,
    lost_tokens=3,
    text=_chat(f"You are a promt engineer. {_EDIT}", closing=""),
    closing="<|im_end|>",
)
IMAGE_TO_VIDEO = Template(
    name="image2video",
    crop=132,
    text=_chat(
        "You are a promt engineer. Your task is to create a highly detailed and effective video description based on "
        "a provided input image.\n" + _CAMERA + "Describe main characters actions.\n"
        "Describe the dynamism of the video and presented actions.\n" + _STYLE
    ),
)
"""Part of the official set, used by no released checkpoint: image to video takes `VIDEO`."""

EDIT_TEMPLATES: dict[str, Template] = {
    "snapshot": IMAGE_EDIT,
    "one-line": Template(
        name="one-line",
        crop=55,
        lost_tokens=5,
        text=f"<|im_start|>system\nYou are a promt engineer. {_EDIT}<|im_end|><|im_start|>user{{}}",
        closing="<|im_end|>",
    ),
    "diffusers": Template(
        name="diffusers",
        crop=54,
        lost_tokens=5,
        text=f"<|im_start|>system\nYou are a prompt engineer. {_EDIT}<|im_end|><|im_start|>user{{}}",
        closing="<|im_end|>",
    ),
}
"""The edit template as released with the weights (default), as rewritten later in the official code, and as in
diffusers 0.42. Which one the weights were trained with is not published (facts sheet 9.4)."""


def template_for(task: str, *, with_images: bool = False, edit_template: str = "snapshot") -> Template:
    """The template of a task: t2v and i2v share one; i2i without an image is t2i.

    Raises:
        ValueError: unknown task or edit template, or images where the template has no place for them.
    """
    if task not in ("t2v", "i2v", "t2i", "i2i"):
        raise ValueError(f"unknown task '{task}'; use t2v, i2v, t2i or i2i")
    if edit_template not in EDIT_TEMPLATES:
        raise ValueError(f"unknown edit template '{edit_template}'; use one of {', '.join(EDIT_TEMPLATES)}")
    if with_images and task != "i2i":
        raise ValueError(f"the text of task '{task}' takes no images; leave them out, or use task i2i")
    if task in ("t2v", "i2v"):
        return VIDEO
    return EDIT_TEMPLATES[edit_template] if with_images else IMAGE
