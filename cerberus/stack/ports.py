"""Free ports on the loopback interface."""

import contextlib
import errno
import pathlib
import secrets
import socket
from collections.abc import Mapping

import orjson

# Below the range from which systems take the ports of outgoing connections: a client that
# retries a stopped server there can end up connected to itself.
_FIRST, _LAST = 20_000, 32_000


def free(port: int) -> bool:
    """Return whether nobody listens on a port of 127.0.0.1 or ::1."""
    for host in ("127.0.0.1", "::1"):
        # Some systems let a socket bind where another listens on every interface.
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5):
            return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True


def assign(wanted: Mapping[str, int], saved: pathlib.Path) -> dict[str, int]:
    """Return for each name its port of last time, else the one it wants, else any free one.

    Args:
        wanted: Name to port; 0 takes any.
        saved: File that remembers the answer; a damaged one is replaced.
    """
    try:
        before = {str(name): int(port) for name, port in orjson.loads(saved.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        before = {}
    taken: dict[str, int] = {}
    for name, preferred in wanted.items():
        candidates = [port for port in (before.get(name, 0), preferred) if port]
        taken[name] = next(
            (p for p in candidates if p not in taken.values() and free(p)), 0
        ) or _any_but(set(taken.values()))
    new = saved.with_suffix(".new")
    new.write_bytes(orjson.dumps(before | taken))
    new.replace(saved)
    return taken


def _any_but(taken: set[int]) -> int:
    while True:
        port = _FIRST + secrets.randbelow(_LAST - _FIRST)
        if port not in taken and free(port):
            return port
