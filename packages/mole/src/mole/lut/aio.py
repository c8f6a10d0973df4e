"""Reads that the system carries out side by side for one thread: Linux's asynchronous I/O.

A thread for every read costs more than a read of a fast disk takes. There is no function for this
in Python or in most C libraries, so the system is called by number.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Sequence

# Numbers of io_setup, io_destroy, io_submit, io_getevents.
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
_READ = 0  # IOCB_CMD_PREAD


class _Control(ctypes.Structure):
    """`struct iocb` of linux/aio_abi.h, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("operation", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("file", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("more", ctypes.c_uint32 * 2),
    )


class _Event(ctypes.Structure):
    """`struct io_event`."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("more", ctypes.c_int64),
    )


class AsyncReads:
    """Reads from one file, many at a time.

    Args:
        file: Descriptor of the file, opened for direct reads: others are carried out in turn.
        depth: Reads at a time.

    Raises:
        OSError: The system has no such calls, or does not let us use them.
    """

    def __init__(self, file: int, depth: int = 64) -> None:
        numbers = _CALLS.get(platform.machine())
        if not sys.platform.startswith("linux") or sys.byteorder != "little" or numbers is None:
            raise OSError("asynchronous reads need Linux on x86_64 or aarch64.")
        self._setup, self._destroy, self._submit, self._reap = numbers
        self._system = ctypes.CDLL(None, use_errno=True).syscall
        self._system.restype = ctypes.c_long
        self._file, self._depth = file, depth
        self._context = ctypes.c_ulong(0)
        self._call(self._setup, ctypes.c_uint(depth), ctypes.byref(self._context))
        self._controls = (_Control * depth)()
        self._pointers = (ctypes.c_void_p * depth)()
        for number, control in enumerate(self._controls):
            control.operation, control.file = _READ, file
            self._pointers[number] = ctypes.addressof(control)
        self._events = (_Event * depth)()
        self._batch = 0
        self.lock = threading.Lock()  # a caller holds it: one thread at a time

    def _call(self, number: int, *arguments: object) -> int:
        """Return what a system call returns."""
        result: int = self._system(ctypes.c_long(number), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result

    def read(self, reads: Sequence[tuple[int, int, int]]) -> list[int]:
        """Carry out reads and return the bytes that each one got.

        Args:
            reads: Address to read to, number of bytes, and offset in the file, of every read; all
                multiples of what the file asks for.

        Raises:
            OSError: A read failed; none is under way any more.
        """
        found: list[int] = []
        for begin in range(0, len(reads), self._depth):
            found += self._some(reads[begin : begin + self._depth])
        failed = [result for result in found if result < 0]
        if failed:
            raise OSError(-failed[0], os.strerror(-failed[0]))
        return found

    def _some(self, reads: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return the results of no more reads than go at a time; errors are negative numbers."""
        # Results of an earlier batch are still to come if waiting for them was interrupted.
        self._batch += 1
        mark = self._batch * self._depth
        for number, (address, size, offset) in enumerate(reads):
            control = self._controls[number]
            control.data = mark + number
            control.address, control.size, control.offset = address, size, offset
        count = ctypes.c_long(len(reads))
        found = [0] * len(reads)  # what the system does not take gets nothing
        try:
            left = self._call(self._submit, self._context, count, self._pointers)
        except BlockingIOError:
            left = 0
        while left:
            try:
                came = self._call(
                    self._reap,
                    self._context,
                    ctypes.c_long(1),
                    ctypes.c_long(self._depth),
                    self._events,
                    None,
                )
            except InterruptedError:
                continue
            for event in self._events[:came]:
                if event.data >= mark:
                    found[event.data - mark] = event.result
                    left -= 1
        return found

    def close(self) -> None:
        """Wait for what is under way, and give everything back."""
        if self._context:
            self._call(self._destroy, self._context)
            self._context = ctypes.c_ulong(0)


__all__ = ["AsyncReads"]
