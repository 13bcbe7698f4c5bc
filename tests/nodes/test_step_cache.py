"""The step cache inside ComfyUI's Python, on our MODEL and on ComfyUI's own."""

import io
import subprocess

import pytest
from PIL import Image

from tests.nodes.comfy_server import PACK, comfyui_python
from tests.nodes.test_core_parity import SCRIPT
from tests.nodes.test_workflows import BASE, ksampler, read
from tests.nodes.workflow_tools import filled, replaced


@pytest.mark.parametrize(
    "check", ["step_cache", "step_cache_parts", "step_cache_native", "step_cache_calibration"]
)
def test_in_comfyui(comfyui, check, tmp_path):
    done = subprocess.run(
        [comfyui_python(comfyui), str(SCRIPT), str(comfyui), str(PACK), check, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"OK {check}" in done.stdout


def with_cache(flow, at="6", **inputs):
    """The workflow with the cache before its sampler."""
    cache = {"class_type": "K5StepCache", "inputs": {"model": flow[at]["inputs"]["model"], **inputs}}
    made = {**flow, "90": cache}
    return {**made, at: {**flow[at], "inputs": {**flow[at]["inputs"], "model": ["90", 0]}}}


STEPS = 12
FLOWS = {
    "ksampler": {"6": ksampler(["1", 0], steps=STEPS)},
    "advanced": {
        "6": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "model": ["1", 0], "add_noise": "enable", "noise_seed": 3, "steps": STEPS, "cfg": 3.0, "positive": ["2", 0],
                "negative": ["3", 0], "latent_image": ["4", 0], "start_at_step": 0, "end_at_step": 10,
            },
        }
    },
    "easy_cache_too": {
        "9": {"class_type": "EasyCache", "inputs": {"model": ["1", 0]}}, "6": ksampler(["9", 0], steps=STEPS),
    },
    "nabla": {
        "9": {"class_type": "K5Attention", "inputs": {"model": ["1", 0], "mode": "nabla", "mass": 0.8}},
        "6": ksampler(["9", 0], steps=STEPS),
    },
    "compiled": {
        "9": {"class_type": "TorchCompileModel", "inputs": {"model": ["1", 0], "backend": "inductor"}},
        "6": ksampler(["9", 0], steps=STEPS),
    },
    "pictures": {
        "1": {"class_type": "K5LoadAll", "inputs": {"model_name": "built-in: nano-image"}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 2}},
        "6": ksampler(["1", 0], steps=STEPS),
    },
}  # fmt: skip


def told(run):
    """What the node showed when the run ended."""
    return [text for node, text in run.texts if node == "90" and text.startswith("MagCache skipped")]


@pytest.mark.parametrize("flow", FLOWS)
def test_works_with_stock_nodes_and_says_what_it_skipped(comfy, info, flow):
    # A threshold of its own, so that ComfyUI runs the node in each flow.
    run = comfy.run(filled(with_cache({**BASE, **FLOWS[flow]}, threshold=0.12 + list(FLOWS).index(flow) / 1000), info))
    assert run.outputs["8"]["images"]
    assert "ratios of nano-" in run.outputs["90"]["text"][0]
    (line,) = told(run)
    assert int(line.split()[2]) > 0, line


@pytest.mark.parametrize("workflow", ["image_to_video", "edit_image", "inpaint"])
def test_shipped_workflows_with_a_cache(comfy, info, workflow):
    flow = read(workflow)
    node = next(name for name, entry in flow.items() if entry["class_type"] == "K5Sample")
    run = comfy.run(filled(with_cache(flow, node), info))
    assert told(run)


def test_cancel_and_again_gives_the_same(comfy, info):
    def picture(flow):
        return Image.open(io.BytesIO(comfy.view(comfy.run(flow).outputs["8"]["images"][0]))).tobytes()

    flow = filled(with_cache({**BASE, "6": ksampler(["1", 0], steps=STEPS)}), info)
    first = picture(flow)
    assert comfy.run(replaced(flow, "6", steps=200, seed=4), interrupt_at=60).interrupted
    # A seed in between makes ComfyUI sample again.
    assert picture(replaced(flow, "6", seed=5)) != first
    assert picture(flow) == first
