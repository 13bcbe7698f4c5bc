"""Inside ComfyUI's Python, without its server: the same numbers as the core."""

import subprocess
from pathlib import Path

import pytest

from tests.nodes.comfy_server import PACK, comfyui_python

SCRIPT = Path(__file__).parent / "in_comfyui.py"


@pytest.mark.parametrize(
    "check",
    ["parity", "image_to_video", "grey_masks", "native_nabla", "merge_and_save", "lora_formats", "missing_package",
     "quantised_checks.choices_of_our_loader", "quantised_checks.fp8_files", "quantised_checks.int8_files",
     "vae_budget"],
)
def test_in_comfyui(comfyui, check, tmp_path):
    run_check(comfyui, check, tmp_path)


def run_check(comfyui, check, tmp_path):
    """One check of `checks.py`, or of another file, in a process of ComfyUI's Python."""
    done = subprocess.run(
        [comfyui_python(comfyui), str(SCRIPT), str(comfyui), str(PACK), check, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"OK {check.rpartition('.')[2]}" in done.stdout
