"""Lines of a chat: typed at a terminal, with history and editing, or from a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from model.errors import UsageError

PROMPT = "> "
_LONGEST_LINE = 64 << 20


def piped_lines() -> Iterator[str]:
    """Lines of stdin.

    Raises:
        UsageError: one is not UTF-8 text.
    """
    for number, line in enumerate(iter(lambda: sys.stdin.buffer.readline(_LONGEST_LINE), b""), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            why = f"line {number} is not UTF-8 text"
            raise UsageError("cannot read input", "stdin", why, "Pipe plain text") from None


def typed_lines(stdout: TextIO, commands: list[str], complain: Callable[[str], None]) -> Iterator[str]:
    """Lines from a terminal until Ctrl-D; Ctrl-C gives up a line, and an empty one is asked for again.

    Args:
        stdout: the terminal.
        commands: offered where a line begins with "/".
        complain: tells what is not a line's own business.
    """
    ask = _toolkit(commands) or _plain(stdout)
    while True:
        try:
            with interrupted_by(signal.default_int_handler):
                line = ask()
        except KeyboardInterrupt:
            complain("/exit or Ctrl-D ends the chat")
            continue
        except EOFError:
            return
        yield line


def _toolkit(commands: list[str]) -> Callable[[], str] | None:
    """Asks with prompt_toolkit, where it is installed; what was typed is remembered as long as the chat lasts."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import InMemoryHistory
    except ImportError:
        return None
    completer = WordCompleter(commands, sentence=True)
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=completer, complete_while_typing=False
    )
    return lambda: session.prompt(PROMPT)


def _plain(stdout: TextIO) -> Callable[[], str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` history and editing

    def ask() -> str:
        # `input` edits lines only where Python's stdout is the terminal itself.
        with contextlib.redirect_stdout(stdout):
            return input(PROMPT)

    return ask


@contextlib.contextmanager
def interrupted_by(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Ctrl-C calls `handler` during the block, where this is the thread that may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
