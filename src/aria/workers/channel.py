"""Messages and open files between two processes, over a socket."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Sequence

PASSES_FILES = hasattr(socket, "send_fds")
"""Whether open files travel with messages; elsewhere, on Windows, they are named."""
_LENGTH = struct.Struct("<I")


class ChannelClosedError(Exception):
    """The other side has ended."""


class Channel:
    """One side of a connection that carries whole messages, in order.

    Args:
        connection: a connected stream socket, which this object closes.
        most: bytes of the longest message that :meth:`receive` takes.
        takes_files: whether files may come with messages; else they are dropped.
    """

    def __init__(self, connection: socket.socket, most: int, *, takes_files: bool = False):
        self._socket = connection
        self._socket.setblocking(True)
        self._most = most
        self._buffer = bytearray()
        self._takes_files = takes_files
        self._files: deque[int] = deque()

    def send(self, message: bytes, files: Sequence[int] = ()) -> None:
        """Send a message, and descriptors of open files with it.

        Raises:
            ChannelClosedError: nobody can receive it.
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
        """The next message; None if there is none within ``seconds``.

        Raises:
            ChannelClosedError: the other side has ended, or sends what is no message.
        """
        while True:
            if len(self._buffer) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(self._buffer)
                if size > self._most:
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
        """The descriptor of the next file that came with the messages received so far."""
        if not self._files:
            raise ChannelClosedError("a file is missing")
        return self._files.popleft()

    def close(self) -> None:
        self._socket.close()

    def _readable(self, seconds: float | None) -> bool:
        if hasattr(select, "poll"):  # select() knows descriptors up to 1,023 only
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
