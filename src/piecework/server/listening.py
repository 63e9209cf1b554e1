"""The socket that a server listens on: made before anything else, so that a port that is taken is told at once."""

from __future__ import annotations

import socket
from typing import Final

from piecework.errors import CapacityError

_BACKLOG: Final = 2048


def listen(host: str, *, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises CapacityError where it can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            asked=f"listen on {host}, port {port}",
            found=str(error),
            try_="another --port (0 takes a free one) or another --host",
        ) from error


def url_of(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
