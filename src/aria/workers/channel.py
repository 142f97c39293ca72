"""Messages and file descriptors between two processes, over a socket."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Sequence

PASSES_FILES = hasattr(socket, "send_fds")
"""Whether descriptors can be sent with messages. On Windows files are passed by path instead."""
_LENGTH = struct.Struct("<I")


class ChannelClosedError(Exception):
    """The other side has closed the connection or broken the protocol."""


class Channel:
    """One side of a connection that transports length-prefixed messages.

    Args:
        connection: A connected stream socket, which this object closes.
        max_bytes: Maximum size of a message that :meth:`receive` accepts.
        takes_files: Whether to accept descriptors sent with messages.
    """

    def __init__(self, connection: socket.socket, max_bytes: int, *, takes_files: bool = False):
        self._socket = connection
        self._socket.setblocking(True)
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._takes_files = takes_files
        self._files: deque[int] = deque()

    def send(self, message: bytes, files: Sequence[int] = ()) -> None:
        """Send a message, with descriptors of open files.

        Raises:
            ChannelClosedError: The other side has closed the connection.
        """
        data = _LENGTH.pack(len(message)) + message
        try:
            if files:
                sent = socket.send_fds(self._socket, [data], list(files))
                data = data[sent:]
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self, seconds: float | None = None) -> bytes | None:
        """Receive the next message; None if there is none within ``seconds``.

        Raises:
            ChannelClosedError: The other side has closed the connection or sent an invalid message.
        """
        while True:
            if len(self._buffer) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._buffer)
                if size > self._max_bytes:
                    raise ChannelClosedError(f"a message of {size:,} bytes")
                end = _LENGTH.size + size
                if len(self._buffer) >= end:
                    message = bytes(self._buffer[_LENGTH.size : end])
                    del self._buffer[:end]
                    return message
            if not self._readable(seconds):
                return None
            self._fill()

    def take_file(self) -> int:
        """Return the next descriptor received with the messages so far."""
        if not self._files:
            raise ChannelClosedError("a file is missing")
        return self._files.popleft()

    def close(self) -> None:
        self._socket.close()

    def _readable(self, seconds: float | None) -> bool:
        if hasattr(select, "poll"):  # select() is limited to descriptors below 1,024
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return bool(poll.poll(None if seconds is None else seconds * 1000))
        return bool(select.select([self._socket], [], [], seconds)[0])

    def _fill(self) -> None:
        try:
            if self._takes_files:
                data, files, _, _ = socket.recv_fds(self._socket, 1 << 16, 16)
                self._files += files
            else:
                data = self._socket.recv(1 << 16)
        except OSError as error:
            raise ChannelClosedError from error
        if not data:
            raise ChannelClosedError
        self._buffer += data
