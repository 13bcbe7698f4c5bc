"""Settings of every test process, and the ComfyUI that some tests need: found, started once, or skipped."""

import os

import pytest
import torch

REASON = "no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers with as many threads each would wait for one another; and so would the processes that they start:
    # threads of OpenMP wait by computing.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_itemcollected(item):
    """One worker for the tests that share a server, and one for those of training jobs, which mostly wait."""
    # Not in pytest_collection_modifyitems: xdist has read the groups before it comes here.
    if "comfyui" in getattr(item, "fixturenames", ()):
        jobs = any(word in item.path.name for word in ("jobs", "training"))
        item.add_marker(pytest.mark.xdist_group("comfyui-jobs" if jobs else "comfyui"))


def pytest_collection_modifyitems(items):
    """The group first, for it takes longest."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def comfyui(request):
    """The folder of a ComfyUI; skips without one, or fails where `K5_REQUIRE_COMFYUI` is set."""
    from tests.nodes.comfy_server import comfyui_path

    if "PYTEST_XDIST_WORKER" in os.environ and request.config.getvalue("loadgroup"):
        assert all("@comfyui" in item.nodeid for item in request.session.items if "comfyui" in item.fixturenames)

    path = comfyui_path()
    if path is None and os.environ.get("K5_REQUIRE_COMFYUI"):
        pytest.fail(REASON)
    if path is None:
        pytest.skip(REASON)
    return path


@pytest.fixture(scope="session")
def comfy(comfyui):
    """A running ComfyUI with the pack."""
    from tests.nodes.comfy_server import ComfyServer

    with ComfyServer() as server:
        yield server


@pytest.fixture(scope="session")
def info(comfy):
    """Schemas of every node."""
    return comfy.object_info()
