"""Make workflows/*.json, their API twins and thumbnails: through the real frontend, from `workflow_specs.py`.

`python tests/web/make_workflows.py [NAME ...]`; needs a ComfyUI and Chromium (tests/nodes/comfy_server.py, browser.py).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import av
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[1] / "nodes"), str(Path(__file__).parent)]
from browser import Browser
from comfy_server import PACK, ComfyServer
from workflow_specs import SPECS, Spec
from workflow_tools import filled

FOLDER = PACK / "workflows"
THUMBNAIL = (320, 320)


def main(names: list[str]) -> None:
    """Every workflow that is named, or all."""
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    with ComfyServer() as server, Browser(server.url) as browser:
        info = server.object_info()
        for name in names or SPECS:
            make(server, browser, name, SPECS[name], info)
            sys.stdout.write(f"{name}\n")


def make(server: ComfyServer, browser: Browser, name: str, spec: Spec, info: dict[str, Any]) -> None:
    """Write the three files of one workflow."""
    graph = browser.laid_out(filled(spec.nodes, info), spec.note)
    browser.load(graph)
    api = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in browser.api().items()}
    run = server.run(api)
    (FOLDER / f"{name}.json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "api" / f"{name}.json").write_text(json.dumps(api, indent=1) + "\n", encoding="utf-8")
    picture_of(server, run.outputs["6" if "6" in run.outputs else "8"]).save(FOLDER / f"{name}.jpg", quality=85)


def picture_of(server: ComfyServer, output: dict[str, Any]) -> Image.Image:
    """The first picture, or the middle frame of the clip, that a save node made."""
    file = output["images"][0]
    data = server.view(file)
    if file["filename"].endswith(".png"):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    else:
        with av.open(io.BytesIO(data)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
        picture = frames[len(frames) // 2]
    scale = min(THUMBNAIL[0] / picture.width, THUMBNAIL[1] / picture.height)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.NEAREST)


if __name__ == "__main__":
    main(sys.argv[1:])
