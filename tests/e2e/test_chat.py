"""`exaone-export chat`, from a pipe and at a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from exaone_export.output import harmless
from runtime.engine import Engine
from runtime.options import GenerationOptions
from tests.e2e.conftest import Bundles

FEW = ("--greedy", "--max-new-tokens", "8")
PATIENCE = 60  # seconds


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}


def command(bundle: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "exaone_export", "chat", str(bundle), *flags]


def chat(bundle: Path, lines: str | bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    given = lines.encode() if isinstance(lines, str) else lines
    return subprocess.run(
        command(bundle, *flags), input=given, capture_output=True, timeout=PATIENCE, env=environment(), check=False
    )


@pytest.fixture(scope="module")
def bundle(bundles: Bundles) -> Path:
    return bundles.bundle("vlm")


def test_answers_to_a_pipe_are_those_of_a_session(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (84, 56), "red").save(tmp_path / "그림 1.png")
    talk = f"안녕?\n\n/image '{tmp_path}/그림 1.png'\n무엇?\n/stats\n/save {tmp_path}/talk\n//help\n"
    done = chat(bundle, talk, *FEW, "--system", "짧게")
    assert done.returncode == 0, done.stderr
    with Engine.load(bundle) as engine:
        session = engine.session(system="짧게")
        options = GenerationOptions(do_sample=False, max_new_tokens=8)
        first = session.send("안녕?", options=options)
        second = session.send("무엇?", [tmp_path / "그림 1.png"], options=options)
        third = session.send("/help", options=options)
        loaded = engine.session()
        loaded.load(tmp_path / "talk")
        assert loaded.messages == session.messages[:-2]
    assert done.stdout.decode() == "".join(harmless(one.text) + "\n" for one in (first, second, third))
    told = done.stderr.decode()
    assert "images and videos encoded: 1" in told
    assert "tokens/s" in told
    assert "cannot" not in told
    # What was saved goes on in another process.
    again = chat(bundle, "//help\n", *FEW, "--load", str(tmp_path / "talk"))
    assert again.stdout.decode() == harmless(third.text) + "\n"
    again = chat(bundle, f"/load {tmp_path}/talk\n//help\n/exit\nnot read\n", *FEW)
    assert again.stdout.decode() == harmless(third.text) + "\n"


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ("/dance\n", 2, "unknown command"),
        ("/think maybe\n", 2, "on, off and auto"),
        ("/image\n", 2, "name of a file"),
        ("/image none.png\n", 2, "no such file"),
        ("/video none.mp4\n", 2, "no such file"),
        ("/load none\n", 2, "No such file"),
        ("/load /dev/zero\n", 2, "ordinary"),
        ("/save /proc/none/talk\n", 2, "/proc/none"),
        (b"\xff\xfe\n", 2, "UTF-8"),
        ("x" * 5000 + "\n", 2, "context"),
        ("/stats\n/think on\n/think auto\n/reset\n/help\n", 0, "/image PATH"),
        ("", 0, ""),
    ],
)
def test_a_line_that_cannot_be_answered_ends_a_script(bundle: Path, lines: str | bytes, code: int, words: str) -> None:
    done = chat(bundle, lines, *FEW)
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert words in told
    assert "Traceback" not in told
    assert done.stdout == b""


@pytest.mark.parametrize("flag", ["--system", "--tools"])
def test_what_a_loaded_conversation_would_not_heed_is_refused(bundle: Path, flag: str) -> None:
    done = chat(bundle, "", "--load", "talk", flag, "words")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"bad option: --load" in done.stderr


def test_an_interrupt_stops_the_answer_and_not_the_chat(bundle: Path) -> None:
    """The text so far is kept, and the next line is answered."""
    flags = ("--greedy", "--max-new-tokens", "1500", "--logprobs", "0")
    running = subprocess.Popen(
        command(bundle, *flags),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    try:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write("하나\n".encode())
        running.stdin.flush()
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        rest, told = running.communicate(b"/stats\n/exit\n", timeout=PATIENCE)
    finally:
        running.kill()
    assert running.returncode == 0, told
    if b"nothing was answered yet" in told:
        assert b"stopped" in told
    assert b"Traceback" not in told
    assert rest.endswith(b"\n")


class Terminal:
    """A chat that believes somebody is typing."""

    def __init__(self, bundle: Path, *flags: str) -> None:
        pid, self.file = pty.fork()
        if pid == 0:
            os.execve(sys.executable, command(bundle, *flags), environment())
        self.pid, self.seen = pid, ""

    def wait_for(self, words: str) -> str:
        """What the terminal shows up to these words, beginning where the last call ended."""
        end = time.monotonic() + PATIENCE
        while words not in self.seen and time.monotonic() < end and select.select([self.file], [], [], PATIENCE)[0]:
            try:
                data = os.read(self.file, 4096)
            except OSError as failure:
                assert failure.errno == errno.EIO
                break
            if not data:
                break
            self.seen += data.decode(errors="replace")
        assert words in self.seen, self.seen
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def end(self) -> int:
        """The exit code after Ctrl-D, which is typed until it comes at a time when a line is read."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                os.write(self.file, b"\x04")
                if select.select([self.file], [], [], 0.3)[0]:
                    os.read(self.file, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.file)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it goes on: {self.seen}")


@pytest.fixture
def terminal(bundle: Path) -> Terminal:
    return Terminal(bundle, "--greedy", "--max-new-tokens", "8")


def test_at_a_terminal_errors_are_told_and_the_chat_goes_on(terminal: Terminal) -> None:
    terminal.wait_for("/help lists commands")
    terminal.wait_for(">")
    terminal.type("/dance\r")
    terminal.wait_for("unknown command: /dance")
    terminal.wait_for(">")
    terminal.type("안녕?\r")
    terminal.wait_for(">")
    terminal.type("/stats\r")
    assert re.search(r"answer: \d+ tokens", terminal.wait_for("tokens/s"))
    terminal.wait_for(">")
    terminal.type("not sent\x03")  # Ctrl-C
    terminal.wait_for("/exit or Ctrl-D ends the chat")
    assert terminal.end() == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("안녕 🙂\n\tok", "안녕 🙂\n\tok"),
        ("👨‍👩‍👧 ‌", "👨‍👩‍👧 ‌"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("ok\rrm -rf", "ok\\rrm -rf"),
        ("\x9b31m\x00\x7f", "\\x9b31m\\x00\\x7f"),
        ("a\u202egnp.exe\u2066", "a\\u202egnp.exe\\u2066"),
    ],
)
def test_a_model_cannot_command_the_terminal(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert "".join(map(harmless, text)) == shown
