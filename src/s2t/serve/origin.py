"""Which names a server of this machine alone answers to, so that a page from elsewhere cannot use it through the browser.

Such a page can reach an address of this machine by a name of its own (DNS rebinding), and send simple requests to it; the
browser then says that name in `Host`, or the page's own in `Origin`.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is this machine's own for itself."""
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def comes_from_here(headers: list[tuple[bytes, bytes]], own: str) -> bool:
    """Whether `Host` and `Origin`, where they are given, name this machine, or the address `own` that the server listens on."""
    hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
    names = [_name(f"//{host}") for host in hosts] + [_name(origin) for origin in origins]
    return all(name is not None and (name == own.lower() or is_loopback(name)) for name in names)


def _name(url: str) -> str | None:
    """The host that a URL names; None where it names none."""
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises for what is none
        return None if "@" in parts.netloc else parts.hostname
    except ValueError:
        return None
