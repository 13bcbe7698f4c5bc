"""In headless Chromium: workflows open and run from the button, nodes show their text, sizes are picked, locales, help."""

import json

import pytest

from kandinsky5_core.config import VARIANTS
from tests.nodes.comfy_server import PACK

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_open_run_from_the_button_and_show_their_result(page, path):
    page.load(json.loads(path.read_text()))
    assert page.missing_nodes() == []
    shipped = json.loads((path.parent / "api" / path.name).read_text())
    sent = page.api()
    assert {node["class_type"] for node in sent.values()} == {node["class_type"] for node in shipped.values()}
    assert {key: node["inputs"] for key, node in sent.items()} == {key: node["inputs"] for key, node in shipped.items()}
    history = page.run()
    assert history["status"]["status_str"] == "success"
    assert any(output.get("images") for output in history["outputs"].values())
    saving = {node["class_type"] for node in sent.values()} & {"SaveImage", "SaveVideo"}
    assert saving and all(min(page.shown_media(node)) > 0 for node in saving)
    assert page.errors == []


def test_nodes_show_what_they_used(page):
    page.load(json.loads((PACK / "workflows" / "text_to_image.json").read_text()))
    page.page.evaluate("() => { const n = app.graph._nodes.find(n => n.type === 'K5Sample');"
                       " n.widgets.find(w => w.name === 'seed').value = 4711; }")  # fmt: skip
    page.run()
    shown = page.page.evaluate(
        "() => app.graph._nodes.find(n => n.type === 'K5Sample').widgets.find(w => w.name === 'k5_shown')?.element.value"
    )
    assert shown.startswith("nano-image: 20 steps, guidance 3, shift 3") and "seed 4711" in shown


def test_a_click_on_a_size_fills_width_and_height(page):
    page.load(json.loads((PACK / "workflows" / "text_to_video.json").read_text()))
    values = page.page.evaluate(
        """() => {
          const node = app.graph._nodes.find(n => n.type === 'K5EmptyLatent');
          const box = node.widgets.find(w => w.name === 'k5_sizes').element;
          box.querySelector('[data-group="1024"]').click();
          box.querySelector('[data-size="1280x768"]').click();
          return ['width', 'height'].map(name => node.widgets.find(w => w.name === name).value);
        }"""
    )
    assert values == [1280, 768]
    assert "k5_sizes" not in json.dumps(page.api())


def test_the_picker_offers_the_variants_resolutions():
    text = (PACK / "web" / "sizes.js").read_text()
    for row in VARIANTS.values():
        assert all(f"[{width}, {height}]" in text for height, width in row.resolutions), row.name


@pytest.mark.parametrize("node", ["K5Sample", "K5EmptyLatent"])
def test_help_page_is_where_the_frontend_looks(comfy, page, node):
    asked = comfy.folder_name.partition(".")[0]
    for folder in (comfy.folder_name, asked):
        answer = page.page.request.get(f"{comfy.url}/extensions/{folder}/docs/{node}.md")
        assert answer.ok and "4k+1" in answer.text()


@pytest.mark.parametrize(("locale", "file"), [("en", "K5EmptyLatent.md"), ("ru", "K5EmptyLatent/ru.md")])
def test_help_opens_in_the_users_language(page, locale, file):
    sentence = next(line for line in (PACK / "web" / "docs" / file).read_text().splitlines()[1:] if line.isprintable() and line)
    page.set_locale(locale)
    try:
        page.load(json.loads((PACK / "workflows" / "text_to_video.json").read_text()))
        assert sentence[:40] in page.help_text("K5EmptyLatent")
    finally:
        page.set_locale("en")


@pytest.mark.parametrize("locale", ["ru", "zh"])
def test_locales(comfy, page, locale):
    told = json.loads((PACK / "locales" / locale / "nodeDefs.json").read_text())["K5EmptyLatent"]
    page.set_locale(locale)
    try:
        page.load(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), api=True)
        shown = page.page.evaluate("() => window.LiteGraph.registered_node_types['K5EmptyLatent'].title")
        assert shown == told["display_name"]
    finally:
        page.set_locale("en")
