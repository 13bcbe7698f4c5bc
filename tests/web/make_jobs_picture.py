"""docs/images/jobs-panel.png: the side panel on a real, small training of some minutes.

`python tests/web/make_jobs_picture.py`; needs a ComfyUI and Chromium.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.nodes.browser import Browser
from tests.nodes.comfy_server import PACK, ComfyServer
from tests.nodes.fake_jobs import make_job
from train.config import (
    DataConfig,
    FitConfig,
    JobConfig,
    LoraConfig,
    SampleConfig,
    SourceConfig,
    ValidationConfig,
)
from train.jobs import Job, Jobs

PROMPTS = (
    "a big red star moves left on a black background",
    "a small yellow star moves up on a gray background",
    "a big green star stays still on a navy background",
    "a big blue circle moves down on a brown background",
)
SIZE = {"width": 1680, "height": 1180}
WIDER = 110
SHOWN_STEP = 430
BESIDE = """() => {
  const canvas = app.canvas, right = document.querySelector('.k5-jobs').getBoundingClientRect().right;
  const nodes = app.graph._nodes, scale = 0.72;
  canvas.ds.scale = scale;
  canvas.ds.offset = [(right + 50) / scale - Math.min(...nodes.map(n => n.pos[0])), 160 / scale - Math.min(...nodes.map(n => n.pos[1]))];
  canvas.setDirty(true, true);
}"""
"""Draws the graph beside the panel."""


def star() -> JobConfig:
    """A shape that the built-in model does not know."""
    return JobConfig(
        name="Star", model="nano-video",
        data=DataConfig(sources=(SourceConfig(path=str(PACK / "workflows" / "datasets" / "star")),), frame_budget=20),
        lora=LoraConfig(rank=16, alpha=16.0), device="cpu", threads=2,
        fit=FitConfig(num_steps=600, learning_rate=3e-3, warmup_steps=20, ema_decay=0.99, checkpoint_every=100),
        validation=ValidationConfig(every=100, samples=tuple(SampleConfig(prompt=prompt, seed=1) for prompt in PROMPTS)),
    )  # fmt: skip


def main() -> None:
    """Start it from the panel, and look when most is done."""
    with ComfyServer() as server, Browser(server.url) as browser:
        jobs, page = server.base / "output" / "kandinsky5" / "jobs", browser.page
        make_job(jobs, "Turquoise", steps=500, state="done", seconds=312.0)
        time.sleep(1.1)  # ids tell the second
        make_job(jobs, "Star edits", steps=180, seconds=201.0)
        time.sleep(1.1)
        job = Jobs(jobs).create(star())
        page.set_viewport_size(SIZE)
        browser.load(json.loads((PACK / "workflows" / "text_to_video.json").read_text()))
        page.locator(".kandinsky5-jobs-tab-button").click()
        page.locator(f'[data-job="{job.id}"]').click()
        page.locator("[data-action=resume]").click()
        widen(browser)
        wait(job, page)
        page.evaluate(BESIDE)
        page.wait_for_timeout(700)
        browser.screenshot(PACK / "docs" / "images" / "jobs-panel.png")
        page.locator("[data-action=stop]").click()
        while job.status().running:
            page.wait_for_timeout(500)


def widen(browser: Browser) -> None:
    """Draw the panel's edge to the right."""
    edge = browser.page.locator(".p-splitter-gutter").first.bounding_box()
    x, y = edge["x"] + edge["width"] / 2, edge["y"] + 400
    browser.page.mouse.move(x, y)
    browser.page.mouse.down()
    browser.page.mouse.move(x + WIDER, y, steps=5)
    browser.page.mouse.up()
    browser.page.mouse.move(x + 600, y)


def wait(job: Job, page: object) -> None:
    """Until most of its steps are made."""
    while job.status().step < SHOWN_STEP:
        if not job.status().running:
            raise RuntimeError(job.log_tail())
        page.wait_for_timeout(1000)
    page.wait_for_timeout(2500)


if __name__ == "__main__":
    main()
