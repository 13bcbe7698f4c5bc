"""Pictures of graphs for the README: `python tests/web/make_pictures.py`; needs a ComfyUI and Chromium."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.nodes.browser import Browser
from tests.nodes.comfy_server import PACK, ComfyServer

SHOWN = ("text_to_video", "edit_image", "inpaint")
CENTRE = """() => {
  const nodes = app.graph._nodes, canvas = app.canvas;
  const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])), bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  const area = canvas.canvas.getBoundingClientRect(), margin = 90;
  const scale = Math.min((area.width - 2 * margin) / (right - left), (area.height - 2 * margin) / (bottom - top));
  canvas.ds.scale = scale;
  canvas.ds.offset = [margin / scale - left, margin / scale - top];
  canvas.setDirty(true, true);
}"""


def main() -> None:
    """docs/images/graph-<workflow>.png of finished runs."""
    folder = PACK / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with ComfyServer() as server, Browser(server.url) as browser:
        browser.page.set_viewport_size({"width": 2400, "height": 1250})
        for name in SHOWN:
            browser.load(json.loads((PACK / "workflows" / f"{name}.json").read_text()))
            browser.run()
            browser.page.evaluate(CENTRE)
            browser.page.wait_for_timeout(1500)
            browser.page.screenshot(path=str(folder / f"graph-{name.replace('_', '-')}.png"),
                                    clip={"x": 60, "y": 40, "width": 2340, "height": 1200})  # fmt: skip


if __name__ == "__main__":
    main()
