"""Runs a bundle: a conversation with images and videos in, text out.

prompt (template, tokens, placeholders) → vision encoder → embedding with the features merged in → decoder, token by
token → text. Nothing heavy is opened before it is needed; `Engine.prompt` opens no graph at all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from model.errors import BundleError, UsageError
from model.jsonfile import read_json_object
from model.progress import NullProgress, Progress
from model.tasks import GENERATION
from runtime import decode
from runtime.conversation import Session
from runtime.execution import Execution
from runtime.forward import Logits
from runtime.generation import Generator
from runtime.graphs import Graphs
from runtime.many import answer_all
from runtime.media import listed
from runtime.opened import Opened
from runtime.options import GenerationOptions
from runtime.presets import AUTO, kind_of, resolve, says_how_to_draw
from runtime.prompt import Prompt
from runtime.refusals import RefusesEncoding, wrong_task
from runtime.request import ImageInput, Medium, Messages, Request, RequestBuilder, VideoInput
from runtime.transcript import Chunk, Result, Timings, chunks

__all__ = ["Chunk", "Engine", "ImageInput", "Messages", "Result", "Timings", "VideoInput"]


class Engine(Opened, RefusesEncoding):
    """A bundle ready to generate. Not for use by two threads at once.

    Make one with `Engine.load`; close it, or use it as a context manager, to free its memory.

    Attributes:
        graphs: the bundle's graphs, its manifest and its configuration.
        task: what the bundle is for.
        requests: the bundle's tokenizer, chat template and image processor.
        defaults: options from the bundle's ``generation_config.json``, but for max_new_tokens, which holds where the
            caller names none, as far as the context has room.
        eos_ids: ids that end a turn, of ``generation_config.json`` and ``config.json`` together.
    """

    def __init__(self, graphs: Graphs, progress: Progress | None = None) -> None:
        self.graphs = graphs
        self.task = graphs.config.task
        if self.task not in GENERATION:
            raise wrong_task("generate", self.task)
        raw, defaults, ends = read_defaults(graphs.folder)
        self.requests = RequestBuilder(graphs.folder, graphs.config, defaults.max_new_tokens)
        self.defaults = dataclasses.replace(defaults, max_new_tokens=None)
        self._draws_its_own_way = says_how_to_draw(raw)
        self.eos_ids = frozenset(graphs.config.eos_token_ids) | ends
        self._generator = Generator(graphs, self.requests, self.eos_ids, progress or NullProgress())

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        ep: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
        execution: Execution | None = None,
    ) -> Self:
        """Opens a bundle; its graphs are loaded by `open`, or when they are first needed.

        Args:
            folder: the bundle.
            ep: execution provider: "auto" (what the bundle was exported for, if it works here, else the CPU), or a
                name, which is taken or refused.
            threads: threads of one operator; None takes one for each core.
            progress: told of loading, and of reading images and long prompts.
            execution: more about a provider that is not the CPU's: its options, its memory, layers, CUDA graph.

        Raises:
            BundleError: the bundle is damaged.
            EnvironmentFault: the execution provider cannot be had, or the bundle was made by a newer version.
            UsageError: there is no such provider, or no such number of threads.
        """
        return cls(Graphs(Path(folder), ep, threads, progress, execution), progress)

    def prompt(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
        videos: Sequence[VideoInput] = (),
        options: GenerationOptions | None = None,
    ) -> Prompt:
        """Renders and tokenizes without running anything; arguments and errors as in `generate`."""
        seen = self.requests.media.scaled(images, videos, options or self.defaults)
        return self.requests.prompt(prompt, seen, system, tools, enable_thinking)

    @overload
    def generate(self, prompt: str | Messages, images: Sequence[ImageInput] = (), **settings: Any) -> Result: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[dict[str, Any]]],
        images: Sequence[Sequence[ImageInput]] = (),
        **settings: Any,
    ) -> list[Result]: ...

    def generate(
        self,
        prompt: Any,
        images: Any = (),
        *,
        videos: Any = (),
        system: str | None = None,
        tools: Messages | None = None,
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> Result | list[Result]:
        """Answers a prompt, a conversation, or a batch of either.

        Args:
            prompt: a text, a list of messages (see `runtime.messages`), or a list of prompts of either form.
            images: paths, Pillow images or uint8 arrays [height, width, 3], in the order of the conversation; they
                come before a text prompt. For a batch, one list for each prompt.
            videos: files, folders of frames, lists of frames, uint8 arrays [frames, height, width, 3], or `Frames`, in
                the order of the conversation; they come after the images. For a batch, one list for each prompt.
            system: text of a system turn put first.
            tools: JSON descriptions of functions the model may call.
            options: replaces the bundle's defaults.
            preset: the model card's sampling values, "general", "document" or "text"; "auto" takes those of the
                prompt's kind, unless generation_config.json has its own. Single options go before it.
            **overrides: single options by name, see `GenerationOptions`.

        Returns:
            A `Result`, or for a batch a list of them, in its order. With a `seed`, the first of a batch draws what it
            would alone; every other place has a stream of its own, which depends on the seed and the place alone.

        Raises:
            UsageError: the prompt, an image or an option cannot be used, or prompt and answer exceed the context.
            BundleError: the bundle is damaged.
            ResourceError: not enough memory.
            NumericalError: the model gives NaN or Inf.
        """
        chosen = self.choose_options(prompt, (images, videos), options=options, preset=preset, **overrides)[1]
        if not isinstance(prompt, (list, tuple)) or not prompt or any(isinstance(part, Mapping) for part in prompt):
            seen = self.requests.media.scaled(images, videos, chosen)
            return self._generator.run([self._request(prompt, seen, system, tools, chosen)], chosen)[0]
        pairs = zip(prompt, self._seen(images, videos, len(prompt), chosen), strict=True)
        requests = [self._request(one, seen, system, tools, chosen) for one, seen in pairs]
        return answer_all(self, self._generator, requests, chosen)

    def stream(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        videos: Sequence[VideoInput] = (),
        system: str | None = None,
        tools: Messages | None = None,
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> Iterator[Chunk]:
        """Answers as `generate`, piece by piece; the last chunk has the whole `Result`.

        Faults of prompt and images are raised by the call itself, those of running by the iteration.
        """
        request, chosen = self.prepare(
            prompt, images, videos=videos, system=system, tools=tools, options=options, preset=preset, **overrides
        )
        return chunks(self._generator.events([request], chosen))

    def prepare(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        videos: Sequence[VideoInput] = (),
        system: str | None = None,
        tools: Messages | None = None,
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> tuple[Request, GenerationOptions]:
        """What one prompt becomes before anything is run, and what it is answered with; arguments as in `generate`.

        Raises:
            UsageError, BundleError, ResourceError: as `generate`.
        """
        chosen = self.choose_options(prompt, (images, videos), options=options, preset=preset, **overrides)[1]
        seen = self.requests.media.scaled(images, videos, chosen)
        return self._request(prompt, seen, system, tools, chosen), chosen

    def session(self, system: str | None = None, tools: Messages | None = None) -> Session:
        """A conversation over this engine whose turns are read once; arguments as in `generate`."""
        return Session(self, self._generator, system, tools)

    @overload
    def generate_ids(self, input_ids: Sequence[int], images: Sequence[ImageInput] = (), **settings: Any) -> Result: ...

    @overload
    def generate_ids(
        self, input_ids: Sequence[Sequence[int]], images: Sequence[Sequence[ImageInput]] = (), **settings: Any
    ) -> list[Result]: ...

    def generate_ids(
        self,
        input_ids: Any,
        images: Any = (),
        *,
        videos: Any = (),
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Result | list[Result]:
        """Continues token ids: `generate` without the template; a list of lists is a batch.

        Placeholders stand in the ids already expanded. Text is decoded if the bundle has a tokenizer.
        """
        chosen = (self.defaults if options is None else options).merged(**overrides)
        self._generator.check(chosen)
        if len(input_ids) == 0 or not isinstance(input_ids[0], (list, tuple, np.ndarray)):
            seen = self.requests.media.scaled(images, videos, chosen)
            return self._generator.run([self.requests.of_ids(input_ids, seen, chosen.max_new_tokens)], chosen)[0]
        pairs = zip(input_ids, self._seen(images, videos, len(input_ids), chosen), strict=True)
        requests = [self.requests.of_ids(ids, seen, chosen.max_new_tokens) for ids, seen in pairs]
        return answer_all(self, self._generator, requests, chosen)

    def logits(
        self, input_ids: Sequence[int], images: Sequence[ImageInput] = (), videos: Sequence[VideoInput] = ()
    ) -> Logits:
        """Logits at every position of one sequence, float32 [sequence, vocab]; arguments as in `generate_ids`."""
        seen = self.requests.media.scaled(images, videos, self.defaults)
        request = self.requests.of_ids(input_ids, seen, 1)
        forward = self._generator.forward([request], self._generator.features([request]))
        ids = np.array([request.token_ids], np.int64)
        parts = []
        for start in range(0, ids.shape[1], decode.CHUNK):
            piece = ids[:, start : start + decode.CHUNK]
            parts.append(forward(piece, np.array([start + piece.shape[1]], np.int64), keep=0)[0])
        return np.concatenate(parts)

    def choose_options(
        self,
        prompt: str | Messages | Sequence[Any],
        images: Sequence[Any] = (),
        *,
        options: GenerationOptions | None = None,
        preset: str | None = None,
        **overrides: Any,
    ) -> tuple[str | None, GenerationOptions]:
        """What `generate` would draw with: the preset's name, None for none, and the options; arguments as there.

        Raises:
            UsageError: an option is refused, or its schema, expression or grammar cannot be held.
            EnvironmentFault: a constraint is asked for and llguidance is not installed.
        """
        thinking = overrides.get("enable_thinking", None if options is None else options.enable_thinking)
        kind = kind_of(self.graphs.config.model_type, prompt, images, thinking)
        if preset == AUTO and options is None and self._draws_its_own_way:
            preset = None
        name, chosen = resolve(preset, kind, self.defaults, options, overrides)
        self._generator.check(chosen)
        return name, chosen

    def _request(
        self,
        prompt: str | Messages,
        seen: Sequence[Medium],
        system: str | None,
        tools: Messages | None,
        options: GenerationOptions,
    ) -> Request:
        rendered = self.requests.prompt(prompt, seen, system, tools, options.enable_thinking, to_run=True)
        return self.requests.of_prompt(rendered, seen, options.max_new_tokens)

    def _seen(self, images: Any, videos: Any, rows: int, options: GenerationOptions) -> Iterator[tuple[Medium, ...]]:
        """What each row of a batch sees, scaled."""
        for pictures, clips in zip(_groups(images, rows, "images"), _groups(videos, rows, "videos"), strict=True):
            yield self.requests.media.scaled(pictures, clips, options)


def _groups(given: Any, rows: int, what: str) -> list[Sequence[Any]]:
    """A batch's images or videos, one list for each row."""
    groups: list[Sequence[Any]] = listed(given, what.removesuffix("s")) or [()] * rows
    if len(groups) != rows or not all(isinstance(group, (list, tuple)) for group in groups):
        why = f"a batch of {rows} needs as many lists of {what}"
        raise UsageError(f"cannot use {what}", what, why, "Give a list for each, empty where there are none")
    return groups


def read_defaults(folder: Path) -> tuple[dict[str, Any], GenerationOptions, frozenset[int]]:
    """A bundle's generation_config.json, the options in it, and its ids that end a turn; nothing where there is none.

    Raises:
        BundleError: it is damaged, or asks for what makes no sense.
    """
    path = folder / "generation_config.json"
    raw = read_json_object(path, BundleError, "cannot open bundle") if path.exists() else {}
    return raw, GenerationOptions.from_generation_config(raw), _eos_ids(raw)


def _eos_ids(raw: Mapping[str, Any]) -> frozenset[int]:
    value = raw.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        why = "eos_token_id is neither a token id nor a list of them"
        raise BundleError("damaged bundle", "generation_config.json", why, "Export the model again")
    return frozenset(values)
