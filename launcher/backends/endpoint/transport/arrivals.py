"""Arrival times of bytes by the kernel's clock, rather than the time at which Python read them."""

from __future__ import annotations

import socket
import struct
import time

SO_TIMESTAMPNS = 35  # from <asm-generic/socket.h>; Python does not define it
TIMESPEC = struct.Struct("@qq")
READ_BYTES = 256 * 1024


class ArrivalClock:
    """Reads a socket, and returns the arrival time of what it read on the clock of `time.perf_counter`.

    The kernel stamps packets with the time of day, which is assumed to run evenly between two calls of `set`. Several
    packets that wait together all get the stamp of the last one. Without stamps (another operating system, an adjusted
    time of day) the arrival time is that of the read.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        connected.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.set()

    def set(self) -> None:
        """Synchronize the two clocks; arrival times from now on are not earlier than this call."""
        self.earliest = time.perf_counter()
        self.offset = time.time() - self.earliest

    def receive(self) -> tuple[float, bytes]:
        """Bytes that have arrived, and their arrival time; empty at the end of the connection. BlockingIOError if there
        are none."""
        data, ancillary, _, _ = self.socket.recvmsg(READ_BYTES, socket.CMSG_SPACE(TIMESPEC.size))
        moment = now = time.perf_counter()
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(content) == TIMESPEC.size:
                seconds, nanoseconds = TIMESPEC.unpack(content)
                moment = seconds - self.offset + nanoseconds * 1e-9
        if not self.earliest <= moment <= now:
            moment = now
        self.earliest = moment
        return moment, data
