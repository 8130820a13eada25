"""Inputs that do on purpose what must not happen, to see that it is noticed."""

from __future__ import annotations

import os
import resource
import time
from random import Random

from model.errors import BundleError
from tests.fuzz.target import Target

KINDS = (b"accepted", b"refused", b"raises", b"wrong", b"aborts", b"endless")


class Selftest(Target):
    """Not among those that are run by default."""

    name, codes = "selftest", frozenset({4})
    short = long = 8

    def mutant(self, random: Random) -> bytes:
        return random.choice(KINDS)

    def run(self, data: bytes) -> bytes:
        if data == b"refused":
            raise BundleError("damaged bundle", "selftest", "it is one of those")
        if data == b"raises":
            raise ValueError("not one of our errors")
        if data == b"aborts":
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
            os.abort()
        while data == b"endless":
            time.sleep(1)
        return data

    def judge(self, data: bytes, accepted: bytes) -> str:
        return "it is one of those" if data == b"wrong" else ""
