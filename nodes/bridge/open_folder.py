"""A folder in the desktop's file manager."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def open_folder(folder: Path) -> None:
    """Show the folder to the person at this machine.

    Raises:
        ValueError: there is no desktop here.
    """
    if sys.platform == "win32":
        os.startfile(folder)
        return
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    has_desktop = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if opener is None or not has_desktop:
        raise ValueError(f"the machine that runs ComfyUI has no desktop to open folders with; the job is in {folder}")
    subprocess.Popen(
        [opener, str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
