"""The port that the app is served on. Apart from the server, which takes a while to import."""

from __future__ import annotations

import errno
import socket

from orch.errors import UsageError

__all__ = ["bind_socket"]


def bind_socket(host: str, port: int, tries: int = 100) -> socket.socket:
    """A socket bound to `port`, or, where that is taken, to the next free one of `tries`; 0 is any free port.

    The caller compares `getsockname()[1]` and tells the user. Raises UsageError for a host that is not this machine's,
    a port that this user may not open, or if all are taken.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error}", hint="--host takes an address of this machine"
        ) from None
    last = port if port == 0 else min(port + tries - 1, 65535)
    for candidate in range(port, last + 1):
        sock = socket.socket(family, kind, proto)
        try:
            # After a restart the old server's connections linger in TIME_WAIT; they must not cost the port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address[0], candidate, *address[2:]))
            sock.listen(2048)  # a bound port that nobody listens on could be bound by a second server too
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise UsageError(
                f"cannot listen on {host}:{candidate}: {error.strerror}",
                hint="choose another --host or --port (ports below 1024 are reserved)",
            ) from None
        sock.setblocking(False)
        return sock
    raise UsageError(f"every port from {port} to {last} on {host} is taken", hint="choose another one with --port")
