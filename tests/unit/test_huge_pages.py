"""Weights in huge pages: asked for where there are any, malloc as usual afterwards, and nothing done elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import huge_pages

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
offered = pytest.mark.skipif(huge_pages._libc() is None, reason="no huge pages, or not glibc's malloc")

# Allocates 96 MiB in pieces of 3, from this thread and from another one, frees them, and says where they lay. A heap of
# another thread is looked for every hundredth of a second, which a busy machine stretches: each piece waits for that.
CHILD = """
import ctypes, mmap, re, sys, threading, time
from pathlib import Path
from runtime import huge_pages

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
found, kept, patience = [], [], 10.0

def advised(address):
    for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(place, 16) for place in part.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return " hg" in part[part.index("VmFlags:"):]

def take(count):
    global patience
    for _ in range(count):
        found.append(libc.malloc(3 << 20))
        while patience > 0 and not advised(found[-1] + (2 << 20)):
            time.sleep(0.01)
            patience -= 0.01
        ctypes.memset(found[-1], 1, 3 << 20)

def field(name):
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", text, re.M)[1]) >> 10

with mmap.mmap(-1, 96 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as plain:  # what the system can spare
    plain.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, 96 << 20, 1 << 20):
        plain[place] = 1
    spare = field("AnonHugePages")
if not huge_pages._libc():
    patience = 0
with huge_pages.huge_pages(96 << 20):
    thread = threading.Thread(target=take, args=(int(sys.argv[1]),))
    thread.start()
    take(32 - int(sys.argv[1]))
    thread.join()
    kept.append(libc.malloc(3 << 20))  # lies above the rest, whose addresses the heap keeps for later
huge = field("AnonHugePages")
asked = sum(bool(advised(address + (2 << 20))) for address in found)
held = field("Anonymous")
for address in found:
    libc.free(address)
huge_pages.give_back()
print(spare, huge, asked, held, field("Anonymous"))
large = libc.malloc(256 << 20)  # larger than what the heap may have left: malloc maps it by itself again
print(bool(ctypes.c_size_t.from_address(large - 8).value & 2))  # its header's bit for a chunk of its own mapping
"""


def run(elsewhere: int, switch: str = "1") -> tuple[list[int], bool]:
    """MiB in huge pages to be had and got, pieces for which they were asked for, MiB held and held after freeing;
    whether malloc maps as it did.
    """
    command = [sys.executable, "-c", CHILD, str(elsewhere)]
    environment = {**os.environ, huge_pages.SWITCH: switch, "PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)  # with which malloc asks by itself
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    numbers, mapped = done.stdout.splitlines()
    return [int(number) for number in numbers.split()], mapped == "True"


@offered
@pytest.mark.parametrize("elsewhere", [0, 16, 32])
def test_memory_lies_in_huge_pages_and_is_given_back(elsewhere: int) -> None:
    (spare, huge, asked, held, left), mapped = run(elsewhere)
    assert asked >= 30  # of 32; a heap's first piece may share its page with what was there before
    if spare < 64:
        pytest.skip("the system has no huge pages to spare")
    assert huge >= 48
    assert 96 <= held < 96 + 48
    assert left < (48 if not elsewhere else 96)  # an empty heap of another thread is kept
    assert mapped


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not say where memory lies")
def test_the_switch_leaves_malloc_alone() -> None:
    (_, _, asked, held, left), mapped = run(0, "0")
    assert (asked, mapped) == (0, True)  # a system that gives huge pages to all may have given some
    assert held >= 96 > left


class Calls(SimpleNamespace):
    """A C library that only remembers what was asked of it."""

    def __init__(self, grows: bool = True) -> None:
        super().__init__(made=[], end=1 << 30, grows=grows)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: int) -> int:
            self.made.append((name, *arguments))
            if name == "malloc" and self.grows:
                self.end += arguments[0]
            return self.end if name == "sbrk" else 7

        return call


def test_what_is_asked_of_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(huge_pages, "_libc", lambda: calls)
    with huge_pages.huge_pages(400 * MIB):
        assert ("madvise", 1 << 30, 500 * MIB, 14) in calls.made
        with huge_pages.huge_pages(400 * MIB):  # one at a time
            assert sum(name == "malloc" for name, *_ in calls.made) == 1
    afterwards = [
        ("mallopt", -1, 64 * MIB),
        ("mallopt", -2, 1 << 17),
        ("mallopt", -3, 32 * MIB),
        ("mallopt", -4, 65536),
    ]
    assert calls.made[-5:] == [*afterwards, ("malloc_trim", 0)]


def test_a_heap_that_cannot_grow_is_not_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(grows=False)
    monkeypatch.setattr(huge_pages, "_libc", lambda: calls)
    with huge_pages.huge_pages(400 * MIB):
        pass
    assert not any(name == "madvise" and 1 << 30 in rest for name, *rest in calls.made)


def test_small_graphs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(huge_pages, "_libc", lambda: calls)
    with huge_pages.huge_pages(huge_pages.LEAST - 1):
        pass
    assert not calls.made


@pytest.mark.parametrize(
    ("enabled", "size", "result"),
    [("always [madvise] never", "2097152", True), ("always madvise [never]", "2097152", False),
     ("[always] madvise never", "2097152", True), ("always [madvise] never", "536870912", False),
     (None, None, False), ("always [madvise] never", "much", False)],
)  # fmt: skip
def test_the_kernels_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: str | None, size: str | None, result: bool
) -> None:
    for name, text in (("enabled", enabled), ("hpage_pmd_size", size)):
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    assert huge_pages._offered() is result


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_limited_address_space_is_not_reserved() -> None:
    script = (
        "import resource; from runtime import huge_pages; "
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); print(huge_pages._limited(), huge_pages._libc())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "None"]
