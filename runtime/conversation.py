"""A conversation whose keys and values stay: a turn costs its own tokens, not those of the turns before."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from model.errors import ExaoneError, NumericalError, ResourceError, UsageError
from runtime.generation import Generator
from runtime.media import listed
from runtime.media_key import media_key
from runtime.messages import Message, build_messages, check_list, check_messages, check_tools
from runtime.options import GenerationOptions
from runtime.reuse import KeptRow, Stopped, media_runs, prompt_keys
from runtime.saved_session import Saved, read_session, write_session
from runtime.transcript import Chunk, Result, chunks

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.request import ImageInput, Medium, Messages, Request, VideoInput


@dataclass(frozen=True)
class Usage:
    """What the last prompt cost.

    Attributes:
        prompt_tokens: its length.
        reused_tokens: of those, how many were in the cache; the others were read.
        read_tokens: the others.
        encoded_media: images and videos that went through the encoder for it.
    """

    prompt_tokens: int
    reused_tokens: int
    read_tokens: int
    encoded_media: int


class Session:
    """A conversation over an engine, made by `Engine.session`. Not for use by two threads at once, but for `stop`.

    Whatever a prompt has in common with what was read and generated before is not read again, and an image or video
    that was seen is not encoded again. The answers are those of an engine that reads everything anew.

    Args:
        engine: stays open as long as the session is used; several sessions may share one.
        generator: the engine's.
        system: text of a system turn put first.
        tools: JSON descriptions of functions the model may call.

    Attributes:
        messages: the turns so far, answers included. What an answer's message has is what templates look for.
        usage: of the last prompt, None before the first.
    """

    def __init__(
        self, engine: Engine, generator: Generator, system: str | None = None, tools: Messages | None = None
    ) -> None:
        self.messages: list[Message] = []
        self.usage: Usage | None = None
        self._engine, self._generator = engine, generator
        self._system = system
        self._tools = check_tools(tools)
        self._media: tuple[Medium, ...] = ()
        self._keys: dict[int, str] = {}  # by the address of a medium, which `_media` keeps
        self._row: KeptRow | None = None
        self._stop = threading.Event()

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._row.keys) if self._row is not None else 0

    def send(self, turn: str | Messages, images: Sequence[ImageInput] = (), **settings: Any) -> Result:
        """Answers the next turn; arguments and errors as in `stream`."""
        return _last(self.stream(turn, images, **settings))

    def stream(
        self,
        turn: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        videos: Sequence[VideoInput] = (),
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> Iterator[Chunk]:
        """Answers the next turn, piece by piece; the last chunk has the whole `Result`.

        The turn and its answer belong to the conversation from then on. Where the iteration is ended before its end,
        or by `stop`, what was said until then does; where nothing was said, or an error comes, the turn does not.

        Args:
            turn: the user's text, or messages to go on with, such as a tool's results.
            images, videos: of this turn, as in `Engine.generate`.
            options, preset, **overrides: as in `Engine.generate`.

        Raises:
            UsageError: the turn cannot be used, or conversation and answer exceed the context. The rest as in
                `Engine.generate`, faults of running by the iteration.
        """
        self._stop.clear()
        history = self.messages
        system = self._system if not history else None
        images, videos = listed(images, "image"), listed(videos, "video")
        if isinstance(turn, str):
            messages = build_messages(turn, len(images), len(videos), system, history)
        else:
            check_list(turn)
            messages = build_messages(system=system, history=[*history, *turn])
        given = (*self._media, *images), videos
        chosen = self._engine.choose_options(messages, given, options=options, preset=preset, **overrides)[1]
        seen = (*self._media, *self._engine.requests.media.scaled(images, videos, chosen, self._media))
        return self._start(messages, seen, chosen)

    def generate(self, messages: Messages, images: Sequence[ImageInput] = (), **settings: Any) -> Result:
        """Answers a whole conversation; arguments and errors as in `stream_messages`."""
        return _last(self.stream_messages(messages, images, **settings))

    def stream_messages(
        self,
        messages: Messages,
        images: Sequence[ImageInput] = (),
        *,
        videos: Sequence[VideoInput] = (),
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> Iterator[Chunk]:
        """Answers a whole conversation, as a client sends it again with each turn, edited or not.

        Images and videos are those of the whole conversation, in order; they are known by what they show. The system
        turn is that of the messages.
        """
        self._stop.clear()
        clean = check_messages(messages)
        given = images, videos
        chosen = self._engine.choose_options(clean, given, options=options, preset=preset, **overrides)[1]
        return self._start(clean, self._engine.requests.media.scaled(images, videos, chosen), chosen)

    def stop(self) -> None:
        """Ends the answer that is prepared or given now, between two passes; for other threads and signal handlers."""
        self._stop.set()

    def reset(self) -> None:
        """Forgets the conversation. What the next one has in common with it is still not read again."""
        self.messages, self._media, self._keys = [], (), {}

    def close(self) -> None:
        """Gives the cache back; what comes next is read anew."""
        self._row = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation with its cache to a file that this user alone may read.

        On a GPU the cache stays where it is, and is read anew after loading.

        Raises:
            UsageError, ResourceError: the file cannot be written.
        """
        row = self._row if self._row is not None and self._row.cache.on_host else None
        known = set(self._keys.values())
        # What only earlier turns showed, before somebody edited them, cannot be told in the file.
        if row is not None and not known.issuperset(key[0] for key in row.keys if isinstance(key, tuple)):
            row = None
        write_session(path, self._engine.graphs, Saved(self.messages, self._tools, self._media, row))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes the place of this conversation by one that `save` wrote.

        Raises:
            BundleError: the file is no session, or is damaged.
            UsageError: it cannot be opened, or was written with another bundle.
            ResourceError: its cache does not fit into memory.
        """
        graphs, progress = self._engine.graphs, self._generator.progress
        loaded = read_session(
            path, graphs, self._engine.requests.media, lambda: KeptRow(graphs.forward(1), progress, self._stop)
        )
        self.messages, self._tools, self._media = list(loaded.messages), loaded.tools, loaded.media
        self._row, self.usage, self._keys = loaded.row, None, {}
        self._keys = self._keys_of(loaded.media)

    def _start(self, messages: list[Message], media: tuple[Medium, ...], options: GenerationOptions) -> Iterator[Chunk]:
        requests = self._engine.requests
        rendered = requests.prompt(messages, media, None, self._tools, options.enable_thinking, to_run=True)
        request = requests.of_prompt(rendered, media, options.max_new_tokens)
        return self._answer(messages, media, request, options)

    def _answer(
        self, messages: list[Message], media: tuple[Medium, ...], request: Request, options: GenerationOptions
    ) -> Iterator[Chunk]:
        said = {"text": "", "reasoning": ""}
        try:
            for chunk in chunks(self._generator.events([request], options, self._row_for)):
                said[chunk.kind] += chunk.text
                if chunk.result is not None:
                    said = {}
                    self._take(messages, media, _message(chunk.result))
                yield chunk
        except Stopped:
            pass
        except ExaoneError as reason:
            said = {}
            if isinstance(reason, NumericalError | ResourceError):
                self._row = None  # what was read may be spoilt too; some buffers may have grown, and others not
            raise
        finally:
            if any(said.values()):
                partial: Message = {"role": "assistant", "content": said["text"]}
                self._take(messages, media, partial | _reasoning(said["reasoning"]))

    def _take(self, messages: list[Message], media: tuple[Medium, ...], answer: Message) -> None:
        self.messages, self._media = [*messages, answer], media
        self._keys = self._keys_of(media)

    def _keys_of(self, media: Sequence[Medium]) -> dict[int, str]:
        """Keys by address, for media that are all there at the same time as the conversation's own."""
        return {id(medium): self._keys.get(id(medium)) or media_key(medium) for medium in media}

    def _row_for(self, request: Request) -> KeptRow:
        """The row, with all that the request shares with it, and features for what it does not."""
        graphs, media, cache = self._engine.graphs, self._engine.requests.media, self._generator.features_of
        if self._row is None:
            self._row = KeptRow(graphs.forward(1, None, request.expected), self._generator.progress, self._stop)
        row, before = self._row, cache.encoded
        keys = self._keys_of(request.images)
        counts = [media.tokens(medium) for medium in request.images]
        named = [(keys[id(medium)], medium) for medium in request.images]
        sizes = [(key, count) for (key, _), count in zip(named, counts, strict=True)]
        held = row.begin(prompt_keys(request.token_ids, sizes, graphs.media_ids), request.limit)
        runs = list(media_runs(request.token_ids, counts, graphs.media_ids))
        missing = [index for index, (_, end) in enumerate(runs) if end > held]
        if missing:
            features = np.concatenate(cache.of([named[index] for index in missing], row.check_stopped))
            row.give(graphs.placed(features[max(0, held - runs[missing[0]][0]) :]))
        else:
            row.give(None)
        self.usage = Usage(len(request.token_ids), row.reused, row.read, cache.encoded - before)
        return row


def _message(result: Result) -> Message:
    """An answer as the turn that a template reads."""
    message: Message = {"role": "assistant", "content": result.text} | _reasoning(result.reasoning)
    return message | ({"tool_calls": result.tool_calls} if result.tool_calls else {})


def _reasoning(text: str) -> Message:
    return {"reasoning_content": text} if text else {}


def _last(stream: Iterator[Chunk]) -> Result:
    result = None
    for chunk in stream:
        result = chunk.result or result
    if result is None:
        raise UsageError("no answer", "session", "it was stopped")
    return result
