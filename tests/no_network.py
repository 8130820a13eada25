"""Runs a program that the kernel kills where it asks for the network: ``no_network.py WHAT PROGRAM ARGUMENT...``.

A seccomp filter, which needs no privileges and holds for native code, for every thread and for every child process.
WHAT ends the process with SIGSYS: ``sockets``: socket(2) of any family but AF_UNIX, which leaves no machine;
``connections``: connect(2) and every call that sends to an address. io_uring, which does all that in another way, is
one of both. `UNAVAILABLE` is the exit code where the kernel or the processor has no such filter.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence

UNAVAILABLE = 77
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER_MODE = 38, 22, 2
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_AF_UNIX, _IO_URING_SETUP = 1, 425
# Processor → AUDIT_ARCH_*, number of socket(2), numbers of connect, sendto, sendmsg and sendmmsg.
_KERNELS = {
    "x86_64": (0xC000003E, 41, (42, 44, 46, 307)),
    "aarch64": (0xC00000B7, 198, (203, 206, 211, 269)),
}
# Bytes into the kernel's `struct seccomp_data`, all values little-endian.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NO_CALL = 0x3FFFFFFF
_OTHER_ABI = 0x40000000  # x32, whose calls have numbers of their own


def _program(architecture: int, socket: int, forbidden: Sequence[int]) -> bytes:
    """The filter, in the kernel's packet-filter instructions: code, jumps if true and false, operand.

    Args:
        architecture: AUDIT_ARCH_* of numbers that mean what is meant here.
        socket: number of the call that makes sockets; those of other families than AF_UNIX are forbidden.
        forbidden: numbers of other calls.
    """
    kill = 8 + len(forbidden)  # the line that does
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 0, kill - 2, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, kill - 4, 0, _OTHER_ABI),
        *((_EQUAL, kill - 5 - place, 0, number) for place, number in enumerate(forbidden)),
        (_EQUAL, 1, 0, socket),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, _AF_UNIX),
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def forbid(what: str) -> bool:
    """From here on this process and its children live without; False where that cannot be had."""
    if sys.platform != "linux" or platform.machine() not in _KERNELS:
        return False
    architecture, socket, sending = _KERNELS[platform.machine()]
    sockets = {"sockets": True, "connections": False}[what]
    program = _program(architecture, socket if sockets else _NO_CALL, [_IO_URING_SETUP, *(() if sockets else sending)])
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return not libc.prctl(_SECCOMP, _FILTER_MODE, ctypes.addressof(header), 0, 0)


if __name__ == "__main__":
    if not forbid(sys.argv[1]):
        raise SystemExit(UNAVAILABLE)
    os.execv(sys.argv[2], sys.argv[2:])
