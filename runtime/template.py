"""Renders a bundle's own chat template.

A template is a program that came with the model, so it runs sandboxed, in a child process with a limit on time and
memory. The child is kept for the life of the renderer: only the first text pays for its start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from model.errors import BundleError, EnvironmentFault, UsageError
from runtime.closing import Closing
from runtime.template_child import encode_frame, read_frame, write_frame
from runtime.tokenizer import load_tokenizer_config

TIME_LIMIT_S: Final = 2.0
MEMORY_LIMIT: Final = 256 * 2**20
_START_LIMIT_S: Final = 60.0
_LARGEST_TEMPLATE: Final = 2**20
_LARGEST_REQUEST: Final = 2**25
_FILE: Final = "chat_template.jinja"
_REMEDY: Final = "Use the template that came with the model"
_PYTHON: Final = "Check the Python installation"

Process = subprocess.Popen[bytes]


class TemplateRenderer(Closing):
    """Renders conversations with one template; a context manager, usable from several threads.

    Args:
        source: the jinja2 template.
        special_tokens: ``bos_token``, ``eos_token`` and so on, as variables of the template.
        where: the file the template came from, for messages.
        time_limit_s: wall-clock seconds for one text, compiling the template included, starting the child not.
        memory_limit: bytes the child may use beyond what it has after its start.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        where: str = _FILE,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.source = source
        self.where = where
        self._special_tokens = dict(special_tokens or {})
        self._time_limit_s = time_limit_s
        self._memory_limit = memory_limit
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._finalizer: weakref.finalize[[Process], Any] | None = None

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str] | None = None) -> TemplateRenderer:
        """The renderer of a bundle's ``chat_template.jinja``, or of the template in its ``tokenizer_config.json``.

        Raises:
            BundleError: there is no template, or it cannot be read.
        """
        source, where = load_chat_template(folder)
        return cls(source, special_tokens, where)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: see `runtime.messages`.
            tools: JSON descriptions of functions the model may call.
            enable_thinking: given to the template unless None.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            UsageError: the template refuses the conversation, or the conversation is too large.
            BundleError: the template fails, takes too long or needs too much memory.
        """
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        request = encode_frame({"template": self.source, "variables": variables})
        if len(request) > _LARGEST_REQUEST:
            why = f"they take {len(request)} bytes of JSON, at most {_LARGEST_REQUEST} are allowed"
            raise UsageError("cannot use messages", "messages", why, "Shorten the conversation")
        with self._lock:
            answer = self._ask(request)
        if "text" in answer:
            return str(answer["text"])
        raise self._error(answer["error"], answer["message"])

    def close(self) -> None:
        """Ends the child; a later `render` starts another."""
        with self._lock:
            self._stop()

    def _error(self, kind: str, message: str) -> BundleError | UsageError:
        message = " ".join(message.split())[:300]
        if kind == "raised":
            return UsageError("cannot use messages", self.where, f"the chat template refuses them: {message}", "")
        if kind == "memory":
            why = f"rendering it needs more than {self._memory_limit >> 20} MiB ({message})"
        else:
            why = f"it fails with {message}"
        return BundleError("cannot render chat template", self.where, why, _REMEDY)

    def _ask(self, request: bytes) -> dict[str, Any]:
        for _ in range(2):  # a child that something else has killed is replaced once
            try:
                process = self._running()
                answer, expired = _exchange(process, request, self._time_limit_s)
            except BaseException:
                self._stop()  # an answer that nobody waited for would be taken for the next one
                raise
            if answer is None or expired or answer.get("error") == "memory":
                self._stop()
            if answer is not None:
                return answer
            if expired:
                why = f"rendering it takes more than {self._time_limit_s:g} s"
                raise BundleError("cannot render chat template", self.where, why, _REMEDY)
        raise BundleError("cannot render chat template", self.where, "rendering it crashes the process", _REMEDY)

    def _running(self) -> Process:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        process = _start(self._memory_limit)
        self._process, self._finalizer = process, weakref.finalize(self, _end, process)
        answer, _ = _exchange(process, b"", _START_LIMIT_S)
        if answer != {"ready": True}:
            self._stop()
            why = "the process that renders it does not start"
            raise EnvironmentFault("cannot render chat template", sys.executable, why, _PYTHON)
        return process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def load_chat_template(folder: Path) -> tuple[str, str]:
    """A bundle's chat template and the name of the file it is in.

    Raises:
        BundleError: there is no template, or it cannot be read.
    """
    path = folder / _FILE
    if not path.exists():
        found = load_tokenizer_config(folder).get("chat_template")
        if isinstance(found, list):  # several named templates, an older form
            found = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}.get("default")
        if not isinstance(found, str) or not found:
            raise BundleError("cannot read bundle", _FILE, "there is no chat template", _REMEDY)
        source, where = found, "tokenizer_config.json"
    else:
        source, where = _read_template(path), _FILE
    if len(source) > _LARGEST_TEMPLATE:
        why = f"the template is longer than {_LARGEST_TEMPLATE} characters"
        raise BundleError("cannot read bundle", where, why, _REMEDY)
    return source, where


def _read_template(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_LARGEST_TEMPLATE + 1)
    except OSError as error:
        raise BundleError("cannot read bundle", path.name, error.strerror or "unreadable", _REMEDY) from error
    except UnicodeDecodeError as error:
        raise BundleError("cannot read bundle", path.name, "it is not UTF-8", _REMEDY) from error


def _start(memory_limit: int) -> Process:
    # -I and -S keep out the user's environment, site and working folder, and save their start-up time.
    script = Path(__file__).with_name("template_child.py")
    folders = [_folder_of(name) for name in ("jinja2", "markupsafe")]
    command = [sys.executable, "-I", "-S", "-B", str(script), str(memory_limit), *folders]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    try:
        # A group of its own: Ctrl-C at the terminal is not for it, not even while it starts.
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, process_group=0)
    except OSError as error:
        why = error.strerror or "it cannot be run"
        raise EnvironmentFault("cannot render chat template", sys.executable, why, _PYTHON) from error


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)  # found, not imported: the parent has no use for it
    if spec is None or spec.origin is None:
        raise EnvironmentFault("cannot render chat template", package, "it is not installed", f"Install {package}")
    return str(Path(spec.origin).parent.parent)


def _exchange(process: Process, request: bytes, limit_s: float) -> tuple[dict[str, Any] | None, bool]:
    """Sends a request, if any, and reads one answer: (answer or None, whether time ran out and it was killed)."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(limit_s, expire)
    timer.daemon = True
    timer.start()
    try:
        if request:
            write_frame(_pipe(process.stdin), request)
        return read_frame(_pipe(process.stdout)), expired.is_set()
    except (OSError, EOFError, ValueError):
        return None, expired.is_set()
    finally:
        timer.cancel()
        timer.join()  # so that no kill comes late, into the next exchange


def _pipe(stream: Any) -> BinaryIO:
    found: BinaryIO = stream
    return found


def _end(process: Process) -> None:
    """Ends a child: it leaves by itself when its input ends, unless it is busy."""
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _pipe(process.stdout).close()
