"""A real ComfyUI on loopback with the pack in it, for tests: started, asked over HTTP and websocket, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PACK = Path(__file__).parents[2]
STARTUP_SECONDS = 180
SILENT_SECONDS = 300
"""A prompt that tells nothing for so long has hung, unless its processes worked; a slow machine alone is no failure."""
WORKING_SHARE = 0.05
"""Of a core: less than that over the silence is waiting."""
PACKED = (
    "__init__.py",
    "kandinsky5_core",
    "nodes",
    "train",
    "web",
    "locales",
    "workflows",
    "pyproject.toml",
    "subgraphs",
)
# A proxy in the environment must not see requests to loopback.
urlopen = build_opener(ProxyHandler({})).open


def comfyui_path() -> Path | None:
    """`$COMFYUI_PATH`, else comfy-cli's default workspace; None where neither holds a ComfyUI."""
    path = Path(os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI")).expanduser()
    return path if (path / "main.py").exists() else None


def comfyui_python(path: Path) -> str:
    """`$COMFYUI_PYTHON`, else the ComfyUI's own environment, else this one."""
    if "COMFYUI_PYTHON" in os.environ:
        return os.environ["COMFYUI_PYTHON"]
    for folder in (".venv", "venv"):
        python = path / folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if python.exists():
            return str(python)
    return sys.executable


TEXT_EVENT = 3
"""Number of ComfyUI's binary messages that carry text for a node."""


class NodeError(Exception):
    """A node failed; `message` is what the user sees."""

    def __init__(self, node_type: str, message: str) -> None:
        super().__init__(f"{node_type}: {message}")
        self.node_type, self.message = node_type, message


@dataclass
class Run:
    """What a prompt came to."""

    prompt_id: str
    outputs: dict[str, Any] = field(default_factory=dict)
    """Per node id, its `ui` output."""
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    previews: int = 0
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Node id and what it showed while the prompt ran."""
    interrupted: bool = False


class ComfyServer:
    """One server in a base directory of its own; a context manager."""

    def __init__(
        self,
        folder_name: str = "ComfyUI-Kandinsky-5.0",
        *,
        beside: dict[str, str] | None = None,
        parent: str | None = None,
    ) -> None:
        """
        Args:
            folder_name: What the pack's folder is called.
            beside: Another pack: file name to text, in a folder `other-pack`.
            parent: Name of the base directory's last part, to have odd characters in the path.
        """
        self.comfyui = comfyui_path()
        assert self.comfyui is not None
        self.root = Path(tempfile.mkdtemp(prefix="k5-comfy-"))
        self.base = self.root / (parent or "base")
        self.folder_name, self.beside = folder_name, beside or {}
        self.process: subprocess.Popen | None = None
        self.port = 0
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> ComfyServer:
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models/loras", "models/diffusion_models"):
            (self.base / folder).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log_path = self.base / "log.txt"
        command = [
            comfyui_python(self.comfyui),
            "-u",
            "main.py",
            "--cpu",
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base / 'comfyui.db'}",
            "--disable-auto-launch",
            "--preview-method",
            "latent2rgb",
        ]
        try:
            self._install()
            self._start(command)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process group and remove the base directory."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self._end_jobs()
        shutil.rmtree(self.root, ignore_errors=True)

    def _end_jobs(self) -> None:
        """Training jobs are made to outlive the server; here nothing shall."""
        for path in self.base.glob("output/kandinsky5/jobs/*/status.json"):
            with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
                process = psutil.Process(json.loads(path.read_text())["pid"])
                if str(path.parent) in " ".join(process.cmdline()):
                    process.kill()

    def _start(self, command: list[str]) -> None:
        # The tests' own paths would let the pack find modules that a user's ComfyUI does not have.
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Other tests run beside it: threads that wait must not spin.
                env={**kept, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def _install(self) -> None:
        pack = self.base / "custom_nodes" / self.folder_name
        pack.mkdir()
        for name in PACKED:
            if (PACK / name).exists():
                (pack / name).symlink_to(PACK / name)
        if self.beside:
            other = self.base / "custom_nodes" / "other-pack"
            other.mkdir()
            for name, text in self.beside.items():
                (other / name).parent.mkdir(parents=True, exist_ok=True)
                (other / name).write_text(text)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.3)
        raise RuntimeError(f"ComfyUI was not ready in {STARTUP_SECONDS} s:\n{self.log()[-4000:]}")

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """Everything the server printed."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """JSON of a POST, where it answers with some."""
        request = Request(self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as response:
            text = response.read()
        return json.loads(text) if text else None

    def view(self, file: dict[str, str]) -> bytes:
        """An output file, as its node's `ui` names it."""
        wanted = {key: file[key] for key in ("filename", "subfolder", "type")}
        with urlopen(f"{self.url}/view?{urlencode(wanted)}", timeout=30) as response:
            return response.read()

    def object_info(self) -> dict[str, Any]:
        """Every node's schema."""
        return self.get("/object_info")

    def upload_image(self, name: str, png: bytes) -> str:
        """Put a picture into the input folder as the UI does; the name that LoadImage takes."""
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + png + f"\r\n--{edge}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        with urlopen(Request(f"{self.url}/upload/image", body, kind), timeout=30) as response:
            return json.load(response)["name"]

    def interrupt(self) -> None:
        """Press cancel."""
        self.post("/interrupt")

    def free(self) -> None:
        """Ask for models and cached results to be dropped; done by the worker shortly after."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def memory(self) -> int:
        """Resident bytes of the process."""
        return psutil.Process(self.process.pid).memory_info().rss

    def run(self, workflow: dict[str, Any], *, interrupt_at: int | None = None, interrupt_in: str | None = None) -> Run:
        """Queue an API workflow and wait for its end.

        Args:
            interrupt_at: Press cancel when a progress of this many steps comes.
            interrupt_in: Press cancel when this node begins.

        Raises:
            NodeError: a node failed, or the prompt was refused (`node_errors`).
        """
        with connect(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}", max_size=None, proxy=None) as socket_:
            try:
                answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})
            except HTTPError as error:
                raise _refused(json.load(error)) from error
            if answer["node_errors"]:
                raise _refused(answer)
            return self._follow(socket_, Run(prompt_id=answer["prompt_id"]), interrupt_at, interrupt_in)

    def _follow(self, socket_: Any, run: Run, interrupt_at: int | None, interrupt_in: str | None) -> Run:
        while True:
            message = self._next(socket_)
            if isinstance(message, bytes):
                if int.from_bytes(message[:4], "big") == TEXT_EVENT:
                    run.texts.append(_node_and_text(message[4:]))
                else:
                    run.previews += 1
                continue
            message = json.loads(message)
            kind, data = message["type"], message["data"]
            if data.get("prompt_id") not in (None, run.prompt_id):
                continue
            if kind == "progress":
                run.progress.append((data["node"], data["value"], data["max"]))
                if interrupt_at is not None and data["value"] >= interrupt_at:
                    self.interrupt()
                    interrupt_at = None
            elif kind == "executing" and data["node"] is not None and data["node"] == interrupt_in:
                self.interrupt()
            elif kind == "executed" and data.get("output"):
                run.outputs[data["node"]] = data["output"]
            elif kind == "execution_error":
                raise NodeError(data["node_type"], data["exception_message"])
            elif kind == "execution_interrupted":
                run.interrupted = True
                return run
            elif kind == "execution_success":
                run.outputs = {**self._history(run.prompt_id)["outputs"], **run.outputs}
                return run

    def _next(self, socket_: Any) -> str | bytes:
        while True:
            worked = self._cpu_seconds()
            try:
                return socket_.recv(timeout=SILENT_SECONDS)
            except TimeoutError:
                # A compiler is silent for minutes on a busy machine.
                if self._cpu_seconds() - worked > WORKING_SHARE * SILENT_SECONDS:
                    continue
                raise TimeoutError(f"no message of the prompt in {SILENT_SECONDS} s:\n{self.log()[-3000:]}") from None
            except ConnectionClosed as error:
                raise RuntimeError(f"ComfyUI hung up ({self.process.poll()}):\n{self.log()[-3000:]}") from error

    def _cpu_seconds(self) -> float:
        """Of the server and of what it started."""
        try:
            server = psutil.Process(self.process.pid)
            family = [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0.0
        total = 0.0
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
        return total

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """The record of a prompt, which is written just after its end is told."""
        for _ in range(100):
            found = self.get(f"/history/{prompt_id}")
            if prompt_id in found:
                return found[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(f"no history of prompt {prompt_id}")


def _node_and_text(data: bytes) -> tuple[str, str]:
    """A text event: the length of the node's id, the id, the text."""
    length = int.from_bytes(data[:4], "big")
    return data[4 : 4 + length].decode(), data[4 + length :].decode()


def _refused(answer: dict[str, Any]) -> NodeError:
    for error in answer.get("node_errors", {}).values():
        reasons = "; ".join(f"{reason['message']}: {reason['details']}" for reason in error["errors"])
        return NodeError(error["class_type"], reasons)
    return NodeError("", json.dumps(answer.get("error", answer)))
