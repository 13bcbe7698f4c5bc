"""Training nodes in a real ComfyUI: jobs of their own, cancel that saves, results in every loader, wrong inputs."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.nodes.comfy_server import ComfyServer, NodeError
from tests.nodes.workflow_tools import filled, replaced
from train.jobs import Jobs

STAR = "a big red star on a black background"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


TRAIN = {
    "1": node("K5TrainingData", folder="built-in: star"),
    "2": node("K5TrainingSettings", what="LoRA", steps=6, rank=4, learning_rate=1e-3, warmup_steps=1, checkpoint_every=2,
              gradient_checkpointing=False, ema_decay=0.5),
    "3": node("K5StartTraining", model_name="built-in: nano-video", data=["1", 0], settings=["2", 0], name="try"),
    "4": node("K5WaitForTraining", job=["3", 0]),
    "5": node("LossGraphNode", loss=["4", 1], filename_prefix="loss"),
}  # fmt: skip
LONG = replaced(TRAIN, "2", steps=5000, checkpoint_every=1000)


def jobs_of(server: ComfyServer) -> Jobs:
    return Jobs(server.base / "output" / "kandinsky5" / "jobs")


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def pixels(server, run, key):
    import io

    return np.asarray(Image.open(io.BytesIO(server.view(run.outputs[key]["images"][0]))).convert("RGB")).astype(int)


def test_a_lora_made_here_does_the_same_in_every_loader(comfy, info):
    """Ours by job, the stock loader by file name, the stock loader of LORA_MODEL, and ours by file name."""
    made = {
        **replaced(TRAIN, "2", learning_rate=1e-2),
        "10": node("K5LoadAll", model_name="built-in: nano-video"),
        "11": node("K5EncodePrompts", clip=["10", 1], positive=STAR, negative=""),
        "12": node("K5EmptyLatent", model=["10", 0]),
        "20": node("K5LoadTrained", model=["10", 0], job=["4", 3]),
        "21": node("LoraLoaderModelOnly", model=["10", 0], lora_name=["4", 4], strength_model=1.0),
        "22": node("LoraModelLoader", model=["10", 0], lora=["4", 0], strength_model=1.0),
        "23": node("K5LoadLora", model=["10", 0], lora_1=["4", 4], strength_1=1.0),
    }
    for number, model in enumerate((["10", 0], ["20", 0], ["21", 0], ["22", 0], ["23", 0])):
        made |= {
            f"3{number}": node("K5Sample", model=model, positive=["11", 0], negative=["11", 1], latent=["12", 0],
                               seed=5, steps=4),
            f"4{number}": node("VAEDecode", samples=[f"3{number}", 0], vae=["10", 2]),
            f"5{number}": node("SaveImage", images=[f"4{number}", 0], filename_prefix=f"lora{number}"),
        }  # fmt: skip
    run = comfy.run(filled(made, info))
    plain, *others = [pixels(comfy, run, f"5{number}") for number in range(5)]
    assert np.abs(others[0] - plain).max() > 8, "the LoRA changes something"
    for other in others[1:]:
        assert np.abs(other - others[0]).max() <= 1


def test_cancel_saves_and_running_again_goes_on(comfy, info):
    long = filled(replaced(LONG, "3", name="cancelled"), info)
    assert comfy.run(long, interrupt_at=3).interrupted
    job = next(job for job in jobs_of(comfy).all() if "cancelled" in job.id)
    first = job.status()
    assert first.state == "stopped" and first.step >= 3 and job.result() is not None
    assert comfy.run(long, interrupt_at=first.step + 3).interrupted
    assert job.status().state == "stopped" and job.status().step >= first.step + 3
    steps = [record["step"] for record in job.progress()]
    assert steps == list(range(1, job.status().step + 1)), "it went on where it had stopped"
    assert [other.id for other in jobs_of(comfy).all() if "cancelled" in other.id] == [job.id]


def test_the_same_settings_find_the_job_done(comfy, info):
    first = comfy.run(filled(replaced(TRAIN, "3", name="once"), info))
    job = next(job for job in jobs_of(comfy).all() if "once" in job.id)
    before = job.read_status()
    comfy.free()
    second = comfy.run(filled(replaced(replaced(TRAIN, "3", name="once"), "5", filename_prefix="again"), info))
    assert first.outputs and second.outputs
    assert job.read_status() == before
    assert len([other for other in jobs_of(comfy).all() if "once" in other.id]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"1": {"folder": "../../etc"}}, "is not there"),
        ({"1": {"folder": "/etc"}}, "is not there"),
        ({"1": {"folder": "nothing here"}}, "input folder"),
        ({"1": {"tasks": "t2v lots"}}, "is not a task and its probability"),
        ({"1": {"max_frames": 6}}, "4k+1"),
        ({"3": {"name": "../up"}}, "must begin with a letter"),
        ({"1": {"folder": "built-in: star-edits"}}, "cannot be trained on"),
        ({"1": {"tasks": "i2i 1"}}, "no such task"),
        ({"4": {"job": "20200101-000000-none"}}, "there is no job"),
        ({"4": {"job": "../../x"}}, "not a job's id"),
    ],
)
def test_wrong_inputs_are_named(comfy, info, change, words):
    wrong = TRAIN
    for key, inputs in change.items():
        wrong = replaced(wrong, key, **inputs)
    with pytest.raises(NodeError) as error:
        comfy.run(filled(wrong, info))
    assert words in error.value.message, error.value.message


def test_jobs_outlive_the_server_and_a_killed_one_is_found(comfyui):
    with ComfyServer() as server:
        info = server.object_info()
        start_only = {key: value for key, value in replaced(LONG, "3", name="outlives").items() if key in "123"}
        server.run(filled(start_only, info))
        job = jobs_of(server).all()[0]
        until(lambda: job.read_status().step > 0 or not job.read_status().running)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        step = job.read_status().step
        until(lambda: job.read_status().step > step)
        assert job.status().running
        pid = job.read_status().pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not job.is_alive())
        assert job.status().state == "lost"


def test_cache_node_reports_and_leaves_shards(comfy, info):
    cached = {"1": TRAIN["1"], "2": node("K5CacheData", model_name="built-in: nano-video", data=["1", 0])}
    run = comfy.run(filled(cached, info))
    assert "24 clips" in json.dumps(run.outputs["2"])
    assert list((comfy.base / "output" / "kandinsky5" / "cache").glob("clip-low-*.tar"))
    assert not [job for job in jobs_of(comfy).all() if job.id.endswith("-cache")]


def test_status_shows_a_plot_and_samples(comfy, info):
    shown = {
        **replaced(TRAIN, "3", name="shown", sample_prompts=STAR, sample_every=3),
        "6": node("K5TrainingStatus", job=["4", 3]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="plot"),
        "8": node("SaveImage", images=["6", 1], filename_prefix="sheet"),
    }
    run = comfy.run(filled(shown, info))
    assert pixels(comfy, run, "7").std() > 5
    sheet = pixels(comfy, run, "8")
    assert sheet.shape[0] > 200 and sheet.std() > 5, "two rows of samples"
    assert "done, step 6 of 6" in json.dumps(run.outputs["6"])
    assert Path(comfy.base / "models" / "loras" / "shown-nano-video-r4-6.safetensors").exists()
