"""The planner as a node, in a running ComfyUI."""

from dataclasses import replace

from kandinsky5_core.config import variant
from kandinsky5_core.memory.choose import BUDGETS, GIB, choose
from kandinsky5_core.memory.estimate import default_job
from kandinsky5_core.memory.told import options_text


def plan(comfy, **inputs):
    values = {"variant": "lite-t2v-5s-sft", "width": 768, "height": 512, "frames": 121, "batch": 1, "budget": 12.0}
    flow = {
        "1": {"class_type": "K5Plan", "inputs": {**values, **inputs}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    outputs = comfy.run(flow).outputs
    assert outputs["1"]["text"] == outputs["2"]["text"]
    return outputs["1"]["text"][0]


def job_in_comfyui(name):
    """Where weights may be cast at every call, so that the feed-forward takes all tokens at once."""
    return replace(default_job(variant(name)), whole=True)


def test_the_plan_is_shown_and_given_on(comfy):
    choice = choose(job_in_comfyui("lite-t2v-5s-sft"), budget_bytes=12 * GIB)
    told = plan(comfy)
    assert f"options: {options_text(choice.settings)}" in told
    assert f"tile_budget {choice.settings.vae_budget_bytes / GIB:g} in Kandinsky 5 Decode Video" in told


def test_the_plan_names_the_inputs_of_nodes(comfy):
    told = plan(comfy, variant="pro-t2v-5s-sft", budget=16.0)
    memory = choose(job_in_comfyui("pro-t2v-5s-sft"), budget_bytes=16 * GIB).settings.memory
    (line,) = [line for line in told.splitlines() if line.startswith("in ComfyUI: ")]
    assert memory.swap_blocks and f"blocks {memory.swap_blocks} in Kandinsky 5 Block Swap" in line
    assert (f"text_weights {memory.text_weights} in the loader" in line) == (memory.text_weights != "as-is")
    assert ("weight_dtype fp8_e4m3fn in the loader" in line) == (memory.weights == "fp8")


def test_what_does_not_fit_is_said_and_no_card_gives_the_table(comfy):
    told = plan(comfy, variant="pro-t2v-10s-sft-hd", width=1280, height=768, frames=241, budget=8.0)
    assert "does not fit 8 GiB" in told and "would fit" in told
    # Tests run ComfyUI on the CPU, which has no memory of its own.
    table = plan(comfy, variant="image-lite-t2i-sft", width=1024, height=1024, budget=0.0)
    assert "1 frame;" in table and all(f"| {budget} GB |" in table for budget in BUDGETS)
