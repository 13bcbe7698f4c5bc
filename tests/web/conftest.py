"""A browser for the tests here: opened once a file, skipped where there is none, or failed where it is required."""

import os

import pytest

from tests.nodes.browser import Browser, missing_browser


@pytest.fixture(scope="module")
def page(comfy):
    """Chromium on the server's frontend."""
    # No longer than a module: Playwright keeps an event loop running, which other tests may want to start themselves.
    reason = missing_browser()
    if reason and os.environ.get("K5_REQUIRE_COMFYUI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with Browser(comfy.url) as browser:
        yield browser
