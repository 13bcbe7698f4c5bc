"""The archive for the Comfy registry: valid, complete, without what users do not need, and it loads."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.nodes.comfy_server import PACK, ComfyServer

NEEDED = (
    "__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "nodes/bridge/model.py",
    "kandinsky5_core/nano/video/dit.safetensors", "kandinsky5_core/nano/image/dit.safetensors",
    "kandinsky5_core/nano/edit/dit.safetensors", "kandinsky5_core/text/prompts/t2v.txt", "train/config.py",
    "web/k5.js", "web/jobs_panel.js", "web/jobs_panel.css", "web/vendor/uplot/uPlot.esm.js", "web/vendor/uplot/uPlot.min.css",
    "web/vendor/uplot/LICENSE", "workflows/text_to_video.json", "workflows/text_to_video.jpg",
    "web/docs/K5Sample.md",
    "web/docs/K5Sample/ru.md",
    "locales/ru/nodeDefs.json",
)  # fmt: skip
UNWANTED = ("tests/", "docs/", "benchmarks/", ".ci/", "Makefile", "constraints-dev.txt", ".venv/", "runs/")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    comfy = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if comfy is None:
        pytest.skip("comfy-cli is not installed")
    if not (PACK / ".git").exists():
        pytest.skip("comfy-cli packs what git lists, and this is no git checkout")
    folder = tmp_path_factory.mktemp("pack") / "checkout"
    # In a copy of what git lists: packing writes into the folder it packs.
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{PACK}", str(folder)], check=True)
    for command in ("validate", "pack"):
        done = subprocess.run(
            [comfy, "--skip-prompt", "--no-enable-telemetry", "node", command], cwd=folder, capture_output=True,
            text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout.lower(), done.stdout
    return folder / "node.zip"


def test_the_archive_holds_what_is_needed_and_nothing_else(archive):
    names = set(zipfile.ZipFile(archive).namelist())
    assert [name for name in NEEDED if name not in names] == []
    assert [name for name in names if name.startswith(UNWANTED)] == []
    assert archive.stat().st_size < 60e6


def test_the_archive_loads_and_runs(archive, comfyui, monkeypatch, tmp_path):
    import json

    pack = tmp_path / "pack"
    zipfile.ZipFile(archive).extractall(pack)
    monkeypatch.setattr("tests.nodes.comfy_server.PACK", pack)
    with ComfyServer("kandinsky-5-studio") as server:
        flow = json.loads((pack / "workflows" / "api" / "text_to_image.json").read_text())
        flow["4"]["inputs"]["steps"] = 1
        assert server.run(flow).outputs["6"]["images"]


def test_requirements_pin_nothing_that_comfyui_owns():
    lines = (PACK / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if "==" in line or "<" in line]
    assert not [line for line in lines if line.startswith(("torchvision", "torchaudio", "diffusers"))]
