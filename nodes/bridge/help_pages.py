"""Help pages where ComfyUI's frontend looks for them, whatever the pack's folder is called."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def serve_help(folder: Path) -> None:
    """Serve web/docs under the folder's name up to its first dot as well.

    The frontend takes the name from the pack's Python module and stops at a dot, so in a folder such as
    `ComfyUI-Kandinsky-5.0` it would ask for pages that are not there.
    """
    asked = folder.name.partition(".")[0]
    if asked == folder.name or not asked:
        return
    from aiohttp import web
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is None:
        return
    try:
        PromptServer.instance.app.add_routes([web.static(f"/extensions/{asked}/docs", folder / "web" / "docs")])
    except (RuntimeError, ValueError) as error:
        log.warning("Kandinsky 5: help pages stay hidden in a folder with a dot: %s", error)
