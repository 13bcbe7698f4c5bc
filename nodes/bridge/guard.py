"""Who may ask the pack's routes: the page of this very server, and programs; never a page from elsewhere."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

PROXY_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
MAX_BODY_BYTES = 65_536


class Refused(Exception):  # noqa: N818 - an answer more than an error
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def check_origin(headers: Mapping[str, str]) -> None:
    """Let pass what the server's own page asks, what a person typed, and what no browser sent.

    A browser tells where a request comes from in Sec-Fetch-Site, over plain HTTP from another machine only in Origin.

    Raises:
        Refused: a page of another origin asks.
    """
    site = headers.get("Sec-Fetch-Site")
    if site in ("same-origin", "none"):
        return
    origin = headers.get("Origin")
    if site is None and (origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()):
        return
    told = f"'{origin}'" if origin else f"another site ({site})"
    raise Refused(403, f"requests from {told} are refused; open ComfyUI itself (a proxy must pass the Host header on)")


def check_json(headers: Mapping[str, str], content_type: str) -> None:
    """Changes need JSON, which a page of another origin cannot send without asking first.

    Raises:
        Refused: the body is something else, or too long.
    """
    if content_type != "application/json":
        raise Refused(415, "send the request with Content-Type: application/json")
    length = headers.get("Content-Length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise Refused(413, f"the body may have at most {MAX_BODY_BYTES} bytes; it may be empty")


def check_at_the_machine(headers: Mapping[str, str], peer: str | None) -> None:
    """The person sits at the machine that runs ComfyUI.

    Raises:
        Refused: the request came from elsewhere, or through a proxy, behind which all look near.
    """
    host = urlsplit(f"//{headers.get('Host', '')}").hostname
    if any(header in headers for header in PROXY_HEADERS) or not _is_loopback(peer) or not _is_loopback(host):
        raise Refused(
            403, "folders can be opened only in a browser on the machine that runs ComfyUI, at http://127.0.0.1; "
            "elsewhere, copy the folder's path"
        )  # fmt: skip


def _is_loopback(host: str | None) -> bool:
    if host is None or host == "localhost":
        return host == "localhost"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
