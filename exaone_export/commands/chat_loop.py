"""A conversation in the terminal: lines in, answers out, and commands that begin with a slash."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from exaone_export import failures
from exaone_export.commands.chat_input import interrupted_by
from exaone_export.output import harmless, print_json
from model.errors import ExaoneError, UsageError

if TYPE_CHECKING:
    from runtime.conversation import Session
    from runtime.engine import Chunk, Result

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = {
    "/image PATH": "show an image with the next line; may be repeated",
    "/video PATH": "show a video file or a folder of frames with the next line; may be repeated",
    "/think on|off|auto": "reason before answering; auto is the template's own default",
    "/stats": "what the last answer took",
    "/save FILE": "keep the conversation in a file",
    "/load FILE": "go on with a conversation from a file",
    "/reset": "begin anew",
    "/help": "show this; a line that begins with // is said with one slash",
    "/exit": "leave",
}
log = logging.getLogger("exaone_export.cli")


class Chat:
    """Answers lines. Answers go to `stdout`, everything else to stderr.

    Args:
        session: what is talked in.
        settings: of every answer, as `Session.stream` takes them.
        stdout: for answers.
        interactive: whether somebody types: a line that cannot be answered is told, and the chat goes on. Else the
            error ends it.
    """

    def __init__(self, session: Session, settings: dict[str, Any], stdout: TextIO, interactive: bool) -> None:
        self._session = session
        self._settings = dict(settings)
        self._stdout = stdout
        self._interactive = interactive
        self._images: list[str] = []
        self._videos: list[str] = []
        self._last: Result | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image, "/video": self._video, "/think": self._think, "/stats": self._stats,
            "/save": self._save, "/load": self._load, "/reset": self._reset, "/help": self._help,
        }  # fmt: skip

    def run(self, lines: Iterable[str]) -> None:
        """Answers until there are no more lines, or one says /exit.

        Raises:
            ExaoneError, OSError: a line cannot be answered, and nobody types.
        """
        for line in lines:
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self._take(line)
            except (ExaoneError, OSError) as failure:
                if not self._interactive or isinstance(failure, BrokenPipeError):
                    raise
                tell(failures.message_lines(failures.explain(failure)))

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.strip().partition(" ")
            if name not in self._commands:
                raise UsageError("unknown command", name, "it is none of the chat's", "See /help")
            self._commands[name](rest.strip())
            return
        self._answer(line[1:] if line.startswith("//") else line)

    def _answer(self, text: str) -> None:
        images, self._images = self._images, []
        videos, self._videos = self._videos, []
        with interrupted_by(lambda number, frame: self._session.stop()):
            stream = self._session.stream(text, images, videos=videos, **self._settings)
            said, result = self._follow(stream)
        if result is None:
            tell("stopped" if said else "stopped before the first word; the line is forgotten")
            return
        self._last = result
        for call in result.tool_calls:
            print_json(call, self._stdout)
        for warning in result.warnings:
            log.warning("%s", warning)

    def _follow(self, stream: Iterator[Chunk]) -> tuple[bool, Result | None]:
        """Prints an answer as it comes; whether anything was said, and the result, None if it was stopped."""
        last, kind, result = "\n", "text", None
        said = False
        for chunk in stream:
            result = chunk.result
            if not chunk.text:
                continue
            if chunk.kind != kind and last != "\n":
                print(file=sys.stderr)
            shown = harmless(chunk.text)
            if chunk.kind == "text":
                print(shown, end="", file=self._stdout, flush=True)
            else:
                dim, plain = (DIM, PLAIN) if sys.stderr.isatty() else ("", "")
                print(f"{dim}{shown}{plain}", end="", file=sys.stderr, flush=True)
            last, kind, said = shown[-1], chunk.kind, True
        if last != "\n" or (result is not None and not said):
            print(file=self._stdout if kind == "text" else sys.stderr, flush=True)
        return said, result

    def _image(self, rest: str) -> None:
        self._images.append(_existing("image", rest))

    def _video(self, rest: str) -> None:
        self._videos.append(_existing("video", rest))

    def _think(self, rest: str) -> None:
        wishes = {"on": True, "off": False, "auto": None}
        if rest not in wishes:
            raise UsageError("cannot use command", "/think", f"{rest[:40]!r} is none of on, off and auto", "See /help")
        self._settings["enable_thinking"] = wishes[rest]

    def _stats(self, rest: str) -> None:
        usage, result = self._session.usage, self._last
        if usage is None or result is None:
            tell("nothing was answered yet")
            return
        times = result.timings
        tell(
            f"prompt: {usage.prompt_tokens} tokens, {usage.reused_tokens} from the cache, {usage.read_tokens} read in "
            f"{times.prefill_s:.2f} s; images and videos encoded: {usage.encoded_media}, {times.vision_s:.2f} s"
        )
        tell(
            f"answer: {len(result.token_ids)} tokens, {times.decode_tokens_per_s:.1f} tokens/s; "
            f"context: {self._session.tokens} tokens"
        )

    def _save(self, rest: str) -> None:
        self._session.save(_named("/save", rest))

    def _load(self, rest: str) -> None:
        self._session.load(_named("/load", rest))
        self._last = None

    def _reset(self, rest: str) -> None:
        self._session.reset()
        self._images, self._videos, self._last = [], [], None

    def _help(self, rest: str) -> None:
        width = max(map(len, HELP))
        for usage, meaning in HELP.items():
            tell(f"{usage:<{width}}  {meaning}")


def tell(text: str) -> None:
    """Says what is no answer."""
    print(text, file=sys.stderr, flush=True)


def _named(command: str, rest: str) -> Path:
    """The path after a command; quotes around it, as drag and drop puts them, are left out."""
    if len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "'\"":
        rest = rest[1:-1]
    if not rest or "\0" in rest:
        raise UsageError("cannot use command", command, "it needs the name of a file", "See /help")
    try:
        return Path(rest).expanduser()
    except RuntimeError:
        raise UsageError(
            "cannot use command", command, "there is no such home folder", "Write the whole path"
        ) from None


def _existing(kind: str, rest: str) -> str:
    path = _named(f"/{kind}", rest)
    if not path.exists():
        raise UsageError(f"cannot use {kind}", str(path), "there is no such file", "Check its name")
    return str(path)
