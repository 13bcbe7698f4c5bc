"""The browser that the other tests rely on, proven with ComfyUI's own nodes and made-up ones."""

import io
import json

from PIL import Image

RED = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 0xFF0000}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness/button"}},
}


def inputs_of(api):
    return {key: (node["class_type"], node["inputs"]) for key, node in api.items()}


def test_the_button_runs_what_is_on_the_canvas_and_the_node_shows_it(comfy, page, tmp_path):
    page.load(RED, api=True)
    assert inputs_of(page.api()) == inputs_of(RED)
    history = page.run()
    (file,) = history["outputs"]["2"]["images"]
    assert page.shown_media("SaveImage") == [64] and page.errors == []
    picture = Image.open(io.BytesIO(comfy.view(file)))
    # From the button, and only from there, the picture carries the canvas too.
    assert [node["type"] for node in json.loads(picture.info["workflow"])["nodes"]] == ["EmptyImage", "SaveImage"]
    page.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size == (1600, 1000)


def test_a_saved_graph_opens_as_it_was(page):
    graph = page.laid_out(RED, "A note.")
    page.load(graph)
    assert inputs_of(page.api()) == inputs_of(RED) and page.missing_nodes() == []
    left = {node["type"]: node["pos"][0] for node in graph["nodes"]}
    assert left["EmptyImage"] < left["SaveImage"] and "MarkdownNote" in left


def test_unknown_nodes_are_found(page):
    graph = page.laid_out(RED, "A note.")
    next(node for node in graph["nodes"] if node["type"] == "EmptyImage")["type"] = "NoSuchNode"
    page.load(graph)
    assert page.missing_nodes() == ["NoSuchNode"]


def test_errors_of_the_page_are_kept_until_the_next_workflow(page):
    page.page.evaluate("() => { setTimeout(() => { throw new Error('made up'); }); }")
    page.page.wait_for_timeout(200)
    assert any("made up" in error for error in page.errors)
    page.load(RED, api=True)
    assert page.errors == []


def test_help_opens_from_the_node(page):
    page.load(RED, api=True)
    assert "blank images" in page.help_text("EmptyImage")
    assert "blank images" not in page.help_text("SaveImage")
