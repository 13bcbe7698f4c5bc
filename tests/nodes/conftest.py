"""ComfyUI for the tests that need one: found, started once, or skipped with the reason."""

import os

import pytest

from tests.nodes.comfy_server import ComfyServer, comfyui_path

REASON = "no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI"


def pytest_collection_modifyitems(items):
    """One worker for the tests that share a server."""
    for item in items:
        if "comfy" in getattr(item, "fixturenames", ()) or "comfyui" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("comfyui"))


@pytest.fixture(scope="session")
def comfyui():
    """The folder of a ComfyUI; skips without one, or fails where `K5_REQUIRE_COMFYUI` is set."""
    path = comfyui_path()
    if path is None and os.environ.get("K5_REQUIRE_COMFYUI"):
        pytest.fail(REASON)
    if path is None:
        pytest.skip(REASON)
    return path


@pytest.fixture(scope="session")
def comfy(comfyui):
    """A running ComfyUI with the pack."""
    with ComfyServer() as server:
        yield server


@pytest.fixture(scope="session")
def info(comfy):
    """Schemas of every node."""
    return comfy.object_info()
