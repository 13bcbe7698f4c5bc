"""Weights in few bits, partial loading and block swap, in ComfyUI's Python and in a running ComfyUI."""

import importlib.util
import io
from pathlib import Path

import pytest
from PIL import Image

from tests.nodes.test_core_parity import run_check
from tests.nodes.test_workflows import BASE, ksampler
from tests.nodes.workflow_tools import filled


@pytest.mark.parametrize(
    "check",
    ["default_equals_the_core", "text_in_parts", "text_weights_may_lie_anywhere", "text_files_in_fp8",
     "text_in_few_bits", "block_swap", "block_swap_in_eight_bits", "dit_may_lie_anywhere",
     "dynamic_vram_is_left_alone", "loaders_with_dynamic_vram", "older_comfyui"],
)  # fmt: skip
def test_in_comfyui(comfyui, check, tmp_path):
    run_check(comfyui, f"memory_checks.{check}", tmp_path)


def test_text_in_nf4(comfyui, tmp_path):
    found = importlib.util.find_spec("bitsandbytes")
    if found is None:
        pytest.skip("bitsandbytes is not installed")
    # ComfyUI's Python has none of its own, and is lent ours.
    (tmp_path / "bitsandbytes").symlink_to(Path(found.origin).parent)
    run_check(comfyui, "memory_checks.text_in_nf4", tmp_path)


def pictures(comfy, info, loader, blocks):
    """The frames of a run with that loader and number of swapped blocks."""
    flow = {
        **BASE,
        "1": {"class_type": "K5LoadAll", "inputs": {"model_name": "built-in: nano-video", **loader}},
        "9": {"class_type": "K5BlockSwap", "inputs": {"model": ["1", 0], "blocks": blocks}},
        "6": ksampler(["9", 0], steps=4),
    }
    run = comfy.run(filled(flow, info))
    views = [comfy.view(image) for image in run.outputs["8"]["images"]]
    return [Image.open(io.BytesIO(view)).tobytes() for view in views]  # the files hold the workflow, too


def test_block_swap_and_weights_over_http(comfy, info):
    plain, swapped = (pictures(comfy, info, {}, blocks) for blocks in (0, 4))
    assert swapped == plain
    lines = [line for line in comfy.log().splitlines() if "Kandinsky 5 Block Swap" in line]
    assert "4 of 5 blocks" in lines[-1]
    assert "loaded partially" in comfy.log()
    small = {"weight_dtype": "int8", "text_weights": "int8"}
    eight, again = (pictures(comfy, info, small, blocks) for blocks in (0, 3))
    assert eight == again and eight != plain


def test_what_is_missing_is_named(comfy, info):
    with pytest.raises(Exception, match="pip install bitsandbytes"):
        pictures(comfy, info, {"text_weights": "nf4"}, 0)
    with pytest.raises(Exception, match="use 0 to 5"):
        pictures(comfy, info, {}, 6)
