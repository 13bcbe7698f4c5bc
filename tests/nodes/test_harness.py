"""The server that the other tests rely on, proven with ComfyUI's own nodes: results, refusals, cancel, files, end."""

import io
from urllib.error import URLError

import psutil
import pytest
from PIL import Image

from tests.nodes import comfy_server
from tests.nodes.comfy_server import ComfyServer, NodeError

RED = 0xFF0000


def red_square(colour=RED):
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": colour}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness/red"}},
    }


def many_nodes(colour):
    """A second or more of blur, in nodes that a cancel can end between."""
    inputs = {"width": 256, "height": 256, "batch_size": 1, "color": colour}
    flow = {"1": {"class_type": "EmptyImage", "inputs": inputs}}
    for node in range(2, 60):
        blur = {"image": [str(node - 1), 0], "blur_radius": 15, "sigma": 5.0}
        flow[str(node)] = {"class_type": "ImageBlur", "inputs": blur}
    flow["60"] = {"class_type": "PreviewImage", "inputs": {"images": ["59", 0]}}
    return flow


def test_outputs_come_back_as_files(comfy):
    (file,) = comfy.run(red_square()).outputs["2"]["images"]
    assert file["subfolder"] == "harness" and file["type"] == "output"
    picture = Image.open(io.BytesIO(comfy.view(file)))
    assert picture.size == (64, 48) and picture.convert("RGB").getpixel((5, 5)) == (255, 0, 0)


def test_a_run_from_the_cache_has_its_outputs_too(comfy):
    first = comfy.run(red_square(0x00FF00))
    assert comfy.run(red_square(0x00FF00)).outputs == first.outputs


def test_uploaded_pictures_can_be_loaded(comfy):
    data = io.BytesIO()
    Image.new("RGB", (32, 16), (0, 0, 255)).save(data, "PNG")
    name = comfy.upload_image("blue square.png", data.getvalue())
    run = comfy.run(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    (file,) = run.outputs["2"]["images"]
    picture = Image.open(io.BytesIO(comfy.view(file))).convert("RGB")
    assert picture.size == (32, 16) and picture.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("outputs", [1, 2])
def test_refused_inputs_are_errors_even_beside_a_valid_output(comfy, outputs):
    flow = red_square()
    flow["1"]["inputs"]["width"] = -1
    if outputs == 2:
        good = red_square(0x0000FF)
        flow |= {"3": good["1"], "4": {**good["2"], "inputs": {**good["2"]["inputs"], "images": ["3", 0]}}}
    with pytest.raises(NodeError, match=r"EmptyImage: .*smaller than min") as raised:
        comfy.run(flow)
    assert raised.value.node_type == "EmptyImage"


def test_an_error_of_a_node_is_told_and_the_next_run_works(comfy):
    (comfy.base / "input" / "broken.png").write_bytes(b"no picture")
    flow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(NodeError) as raised:
        comfy.run(flow)
    assert raised.value.node_type == "LoadImage" and raised.value.message
    assert comfy.run(red_square()).outputs["2"]["images"]


def test_cancel_ends_a_run_and_the_next_works(comfy):
    run = comfy.run(many_nodes(RED), interrupt_in="3")
    assert run.interrupted and "60" not in run.outputs
    comfy.free()
    assert comfy.run(red_square()).outputs["2"]["images"]


def test_stop_ends_the_process_and_leaves_no_folder(comfyui):
    with ComfyServer() as server:
        process, root = psutil.Process(server.process.pid), server.root
        assert root.exists() and server.memory() > 0
    assert not process.is_running() and not root.exists()
    with pytest.raises(URLError):
        server.get("/system_stats")


def test_a_failed_start_shows_the_log_and_leaves_nothing(comfyui, monkeypatch, tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('no such card')\n")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", comfy_server.comfyui_python(comfyui))
    server = ComfyServer()
    with pytest.raises(RuntimeError, match="no such card"):
        server.__enter__()
    assert not server.root.exists()
