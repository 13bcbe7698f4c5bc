"""Headless Chromium on a ComfyUI: open, load a workflow, run it, look at it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
READY = "() => window.app && window.app.graph && window.app.extensionManager && document.querySelector('#graph-canvas')"
LAYERS = """
() => {
  // What a user opens must give what the thumbnail shows.
  window.app.graph._nodes.forEach(node => (node.widgets || []).forEach(widget => {
    if (widget.name === 'control_after_generate') widget.value = 'fixed';
  }));
  const graph = window.app.graph, depth = new Map(), nodes = graph._nodes;
  const inputsOf = node => (node.inputs || []).map(i => i.link).filter(l => l != null)
      .map(l => graph.getNodeById((graph.links.get ? graph.links.get(l) : graph.links[l]).origin_id));
  const of = node => {
    if (!depth.has(node.id)) { depth.set(node.id, 0);
      depth.set(node.id, Math.max(-1, ...inputsOf(node).map(of)) + 1); }
    return depth.get(node.id);
  };
  nodes.forEach(of);
  const columns = [];
  nodes.forEach(node => (columns[depth.get(node.id)] ||= []).push(node));
  let x = 0;
  columns.forEach(column => {
    let y = 0, width = 0;
    column.forEach(node => {
      const size = node.computeSize();
      node.size = [Math.max(size[0], 300), Math.max(size[1], node.size[1] > 600 ? size[1] : node.size[1])];
      node.pos = [x, y];
      y += node.size[1] + (node.type.startsWith('K5Load') ? 170 : 70); width = Math.max(width, node.size[0]);
    });
    x += width + 60;
  });
}
"""
MEDIA = """
(type) => {
  const node = window.app.graph._nodes.find(node => node.type === type);
  const videos = [...(node.videoContainer?.querySelectorAll('video') ?? [])];
  const widths = [...(node.imgs ?? []).map(image => image.naturalWidth), ...videos.map(video => video.videoWidth)];
  return widths.length > 0 && widths.every(width => width > 0) ? widths : null;
}
"""
SHOW = """
(type) => {
  const canvas = window.app.canvas, node = window.app.graph._nodes.find(node => node.type === type);
  // The title in the middle: only what is in view loads its media, and the buttons above it may not lie under the tabs.
  canvas.ds.scale = 1;
  canvas.ds.offset = [600 - node.pos[0], 500 - node.pos[1]];
  canvas.deselectAll();
  canvas.selectNode(node, false);
  canvas.setDirty(true, true);
}
"""
HELP = """
(type) => {
  // The panel may still show another node's page: wait for the one that has this node's name.
  const text = document.querySelector('.node-help-content')?.innerText ?? '';
  return text.includes(window.LiteGraph.registered_node_types[type].title) ? text : null;
}
"""
ADD_NOTE = """
(text) => {
  const note = window.LiteGraph.createNode('MarkdownNote');
  window.app.graph.add(note);
  note.pos = [0, -420]; note.size = [620, 340];
  note.widgets[0].value = text;
}
"""


def chromium() -> str | None:
    """`$CHROMIUM`, else the one on the PATH; None where there is none."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def missing_browser() -> str | None:
    """Why there can be no browser here; None where there can."""
    if chromium() is None:
        return "no Chromium on the PATH or in $CHROMIUM"
    return None if importlib.util.find_spec("playwright") else "playwright is not installed"


class Browser:
    """One page on a server's frontend; a context manager."""

    def __init__(self, url: str, *, locale: str = "en") -> None:
        self.url, self.locale = url, locale

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
            self.page = self._browser.new_page(viewport={"width": 1600, "height": 1000})
            self.errors: list[str] = []
            self.page.on("pageerror", lambda error: self.errors.append(str(error)))
            self.set_locale(self.locale)
        except BaseException:
            # A Playwright left running breaks every later one of this process; it ends its Chromium too.
            self._playwright.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    def set_locale(self, locale: str) -> None:
        """Open the page in a language."""
        settings = {"Comfy.TutorialCompleted": True, "Comfy.Locale": locale, "Comfy.InstalledVersion": "9.9.9"}
        self.page.request.post(f"{self.url}/settings", data=settings)
        self.page.goto(self.url)
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_timeout(1500)

    def load(self, graph: dict[str, Any], *, api: bool = False) -> None:
        """Open a workflow as dropping its file on the canvas does; forgets the errors of the one before."""
        self.errors.clear()
        if api:
            self.load_api(graph)
            return
        self.page.evaluate("async (graph) => { await window.app.loadGraphData(graph); }", graph)
        self.page.wait_for_timeout(500)

    def load_api(self, api: dict[str, Any]) -> None:
        """Open a workflow in API form."""
        self.page.evaluate("async (api) => { await window.app.loadApiJson(api, 'workflow'); }", api)
        self.page.wait_for_timeout(500)

    def laid_out(self, api: dict[str, Any], note: str) -> dict[str, Any]:
        """The UI form of an API workflow, in columns from left to right under a note."""
        self.load_api(api)
        self.page.evaluate(LAYERS)
        self.page.evaluate(ADD_NOTE, note)
        return self.page.evaluate("() => window.app.graph.serialize()")

    def missing_nodes(self) -> list[str]:
        """Types on the canvas that this ComfyUI does not have: red nodes."""
        return self.page.evaluate(
            "() => window.app.graph._nodes.filter(n => !window.LiteGraph.registered_node_types[n.type]).map(n => n.type)"
        )

    def api(self) -> dict[str, Any]:
        """What the run button would send."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def run(self, timeout_ms: int = 1_200_000) -> dict[str, Any]:
        """Press the run button and wait for the end; the history entry of the prompt."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as asked:
            self.page.locator('[data-testid="queue-button"]').first.click()
        prompt_id = asked.value.json()["prompt_id"]
        for _ in range(timeout_ms // 200):
            found = self.page.request.get(f"{self.url}/history/{prompt_id}").json()
            if prompt_id in found:
                self.page.wait_for_timeout(800)
                return found[prompt_id]
            self.page.wait_for_timeout(200)
        raise TimeoutError(f"the prompt did not end in {timeout_ms} ms")

    def shown_media(self, node_type: str, timeout_ms: int = 20_000) -> list[int]:
        """Widths of the pictures or videos that a node shows, once all of them are loaded."""
        self.page.evaluate(SHOW, node_type)
        return self.page.wait_for_function(MEDIA, arg=node_type, timeout=timeout_ms).json_value()

    def help_text(self, node_type: str) -> str:
        """What the help panel says after a click on the node's info button."""
        self.page.evaluate(SHOW, node_type)
        self.page.locator('[data-testid="info-button"]').click()
        return self.page.wait_for_function(HELP, arg=node_type, timeout=20_000).json_value()

    def fit(self) -> None:
        """Show the whole graph."""
        self.page.evaluate("() => window.app.canvas.fitViewToSelectionAnimated?.() ")
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(700)

    def screenshot(self, path: Path) -> None:
        """What the page looks like."""
        self.page.screenshot(path=str(path))
