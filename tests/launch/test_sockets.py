"""Connections that are cut end for both sides; those of others stay."""

from __future__ import annotations

import os
import socket

from hethub.launch.sockets import Connections


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    return one, other


def test_what_was_opened_in_between_is_cut_and_nothing_else() -> None:
    """Seen to catch: connections of before cut as well, as Ray's are."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = pair(listener)
        connections = Connections()
        ours, gone = pair(listener), pair(listener)
        connections.note()
        after = pair(listener)
        number = gone[0].fileno()
        gone[0].close()
        os.dup2(after[0].fileno(), number)  # its number is another's by now
        connections.cut()
        assert ours[0].recv(1) == b"" and ours[1].recv(1) == b""
        for one, other in (before, after):
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        os.close(number)
        for sockets in (before, ours, after, gone):
            for one in sockets:
                one.close()
