"""Training jobs over HTTP, for the side panel: `/kandinsky5/jobs` on ComfyUI's server.

    GET   /kandinsky5/jobs                             every job in short
    GET   /kandinsky5/jobs/{id}                        one with its settings and samples
    GET   /kandinsky5/jobs/{id}/progress?after=STEP    its steps
    GET   /kandinsky5/jobs/{id}/log?bytes=N            the end of its log
    GET   /kandinsky5/jobs/{id}/samples/{step}/{file}  a picture or clip
    POST  /kandinsky5/jobs/{id}/stop|resume|delete|open

Answers are JSON; errors are {"error": text}. Files are read in threads, so that the server goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ...train.jobs import Job, Jobs, launch
from . import job_views
from .guard import Refused, check_at_the_machine, check_json, check_origin
from .jobs import jobs
from .open_folder import open_folder

log = logging.getLogger(__name__)

ROOT = "/kandinsky5/jobs"
ACTIONS = ("stop", "resume", "delete", "open")
PRIVATE = {"Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def serve_jobs() -> None:
    """Add the routes to ComfyUI's server; before it is up, and once, even if the pack is there twice."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", None) == ROOT for route in server.routes):
        return
    routes = JobRoutes(jobs, server.prompt_queue)
    for method, path, handler in routes.table():
        server.routes.route(method, ROOT + path)(_answering(handler))


def _answering(handler: Handler) -> Handler:
    """The handler behind the guard, its errors told in JSON."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            check_origin(request.headers)
            if request.method == "POST":
                check_json(request.headers, request.content_type)
            return await handler(request)
        except Refused as refused:
            return _json({"error": refused.message}, refused.status)
        except OSError as error:
            log.exception("Kandinsky 5 jobs: %s", request.path)
            return _json({"error": f"the jobs folder cannot be used: {error}"}, 500)

    return answer


def _json(value: Any, status: int = 200) -> web.Response:
    text = json.dumps(job_views.finite(value), ensure_ascii=False, allow_nan=False)
    headers = {**PRIVATE, "Cache-Control": "no-store"}
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


class JobRoutes:
    """The handlers; `queue` is ComfyUI's, which is asked to free memory for a job."""

    def __init__(self, find_jobs: Callable[[], Jobs], queue: Any) -> None:
        self.find_jobs, self.queue = find_jobs, queue
        # Two clicks at once must not start a job twice.
        self.changing = asyncio.Lock()

    def table(self) -> list[tuple[str, str, Handler]]:
        """(method, path, handler); the last two take what is left."""
        changes = [("POST", f"/{{id}}/{name}", getattr(self, name)) for name in ACTIONS]
        return [
            ("GET", "", self.every),
            ("GET", "/{id}", self.details),
            ("GET", "/{id}/progress", self.progress),
            ("GET", "/{id}/log", self.log),
            ("GET", "/{id}/samples/{step}/{file}", self.sample),
            *changes,
            ("*", "", self.nothing),
            ("*", "/{rest:.*}", self.nothing),
        ]

    async def every(self, request: web.Request) -> web.Response:
        """GET of the list."""
        return _json({"jobs": await asyncio.to_thread(lambda: job_views.all_jobs(self.find_jobs()))})

    async def details(self, request: web.Request) -> web.Response:
        """GET of one job."""
        return await self._view(request, job_views.details)

    async def progress(self, request: web.Request) -> web.Response:
        """GET of its steps."""
        after = _number(request, "after", 0, 0, 10**12)
        return await self._view(request, lambda job: job_views.progress(job, after))

    async def log(self, request: web.Request) -> web.Response:
        """GET of the end of its log."""
        num_bytes = _number(request, "bytes", 20_000, 1, job_views.MAX_LOG_BYTES)
        return await self._view(request, lambda job: job_views.log(job, num_bytes))

    async def sample(self, request: web.Request) -> web.StreamResponse:
        """GET of a picture or clip."""
        job = await self._job(request)
        step, name = request.match_info["step"], request.match_info["file"]
        file = await asyncio.to_thread(job_views.sample_file, job, step, name)
        if file is None:
            raise Refused(404, f"job {job.id} has no sample '{name}' of step {step}")
        return web.FileResponse(file, headers={**PRIVATE, "Cache-Control": "private, no-cache"})

    async def stop(self, request: web.Request) -> web.Response:
        """POST: save and end."""
        return await self._change(request, _stop)

    async def resume(self, request: web.Request) -> web.Response:
        """POST: go on from the last checkpoint."""
        return await self._change(request, self._resume)

    async def delete(self, request: web.Request) -> web.Response:
        """POST: remove a job that does not run."""
        return await self._change(request, self._delete)

    async def open(self, request: web.Request) -> web.Response:
        """POST: show the folder on the desktop of the machine itself."""
        check_at_the_machine(request.headers, request.remote)
        return await self._change(request, _open)

    async def nothing(self, request: web.Request) -> web.Response:
        """What no other handler takes."""
        name = request.path.rpartition("/")[2]
        if name in ACTIONS:
            raise Refused(405, f"'{name}' changes a job: send it as POST with Content-Type: application/json")
        if request.method not in ("GET", "HEAD"):
            raise Refused(405, f"{request.method} is not for this address; jobs are read with GET")
        raise Refused(404, "there is nothing at this address; jobs are listed at /kandinsky5/jobs")

    async def _job(self, request: web.Request) -> Job:
        try:
            return await asyncio.to_thread(lambda: self.find_jobs().get(request.match_info["id"]))
        except ValueError as error:
            raise Refused(404, str(error)) from error

    async def _view(self, request: web.Request, view: Callable[[Job], Any]) -> web.Response:
        job = await self._job(request)
        try:
            return _json(await asyncio.to_thread(view, job))
        except FileNotFoundError:
            raise Refused(404, f"job {job.id} was just deleted") from None

    async def _change(self, request: web.Request, change: Callable[[Job], None]) -> web.Response:
        async with self.changing:
            job = await self._job(request)
            await asyncio.to_thread(change, job)
        return _json({"id": job.id, "ok": True})

    def _resume(self, job: Job) -> None:
        status = job.status()
        if status.running or status.state == "done":
            told = "is running already" if status.running else "is done; start a new one to train on"
            raise Refused(409, f"job {job.id} {told}")
        try:
            device = job.config().device
            launch(job)
        except ValueError as error:
            raise Refused(409, str(error)) from error
        if device != "cpu":
            # Done by the worker between two prompts: models in use stay.
            self.queue.set_flag("unload_models", True)
            self.queue.set_flag("free_memory", True)

    def _delete(self, job: Job) -> None:
        try:
            self.find_jobs().delete(job.id)
        except ValueError as error:
            raise Refused(409, str(error)) from error


def _stop(job: Job) -> None:
    status = job.status()
    if not status.running:
        raise Refused(409, f"job {job.id} does not run ({status.state}); there is nothing to stop")
    job.stop()


def _open(job: Job) -> None:
    try:
        open_folder(job.folder)
    except ValueError as error:
        raise Refused(501, str(error)) from error


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query.

    Raises:
        Refused: it is something else.
    """
    text = request.query.get(name, str(default))
    if not text.isascii() or not text.isdecimal() or len(text) > 15 or not low <= int(text) <= high:
        raise Refused(400, f"{name} must be a whole number from {low} to {high}, got '{text}'")
    return int(text)
