"""Runs a bundle: a conversation and images in, text out.

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
from runtime.forward import Logits
from runtime.generation import Generator
from runtime.graphs import Graphs
from runtime.opened import Opened
from runtime.options import GenerationOptions
from runtime.prompt import Prompt
from runtime.refusals import RefusesEncoding, wrong_task
from runtime.request import ImageInput, Messages, Request, RequestBuilder
from runtime.transcript import Chunk, Result, Timings, chunks

__all__ = ["Chunk", "Engine", "ImageInput", "Messages", "Result", "Timings"]


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
        path = graphs.folder / "generation_config.json"
        raw = read_json_object(path, BundleError, "cannot open bundle") if path.exists() else {}
        defaults = GenerationOptions.from_generation_config(raw)
        self.requests = RequestBuilder(graphs.folder, graphs.config, defaults.max_new_tokens)
        self.defaults = dataclasses.replace(defaults, max_new_tokens=None)
        self.eos_ids = frozenset(graphs.config.eos_token_ids) | _eos_ids(raw)
        self._generator = Generator(graphs, self.requests, self.eos_ids, progress or NullProgress())

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        ep: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Opens a bundle; its graphs are loaded by `open`, or when they are first needed.

        Args:
            folder: the bundle.
            ep: execution provider: "auto" (what the bundle was exported for, if it works here, else the CPU), or a
                name, which is taken or refused.
            threads: threads of one operator; None takes one for each core.
            progress: told of loading, and of reading images and long prompts.

        Raises:
            BundleError: the bundle is damaged.
            EnvironmentFault: the execution provider cannot be had, or the bundle was made by a newer version.
            UsageError: there is no such provider, or no such number of threads.
        """
        return cls(Graphs(Path(folder), ep, threads, progress), progress)

    def prompt(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        tools: Messages | None = None,
        enable_thinking: bool | None = None,
    ) -> Prompt:
        """Renders and tokenizes without running anything; arguments and errors as in `generate`."""
        return self.requests.prompt(prompt, self.requests.scaled(images), system, tools, enable_thinking)

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
        system: str | None = None,
        tools: Messages | None = None,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Result | list[Result]:
        """Answers a prompt, a conversation, or a batch of either.

        Args:
            prompt: a text, a list of messages (see `runtime.messages`), or a list of prompts of either form.
            images: paths, Pillow images or uint8 arrays [height, width, 3], in the order of the conversation; they
                come before a text prompt. For a batch, one list for each prompt.
            system: text of a system turn put first.
            tools: JSON descriptions of functions the model may call.
            options: replaces the bundle's defaults.
            **overrides: single options by name, see `GenerationOptions`.

        Returns:
            A `Result`, or for a batch a list of them.

        Raises:
            UsageError: the prompt, an image or an option cannot be used, or prompt and answer exceed the context.
            BundleError: the bundle is damaged.
            ResourceError: not enough memory.
            NumericalError: the model gives NaN or Inf.
        """
        chosen = self._options(options, overrides)
        if isinstance(prompt, str) or not prompt or any(isinstance(part, Mapping) for part in prompt):
            return self._generator.run([self._request(prompt, images, system, tools, chosen)], chosen)[0]
        pairs = zip(prompt, _groups(images, len(prompt)), strict=True)
        return self._generator.run([self._request(one, group, system, tools, chosen) for one, group in pairs], chosen)

    def stream(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        tools: Messages | None = None,
        options: GenerationOptions | None = None,
        **overrides: Any,
    ) -> Iterator[Chunk]:
        """Answers as `generate`, piece by piece; the last chunk has the whole `Result`.

        Faults of prompt and images are raised by the call itself, those of running by the iteration.
        """
        chosen = self._options(options, overrides)
        request = self._request(prompt, images, system, tools, chosen)
        return chunks(self._generator.events([request], chosen))

    @overload
    def generate_ids(self, input_ids: Sequence[int], images: Sequence[ImageInput] = (), **settings: Any) -> Result: ...

    @overload
    def generate_ids(
        self, input_ids: Sequence[Sequence[int]], images: Sequence[Sequence[ImageInput]] = (), **settings: Any
    ) -> list[Result]: ...

    def generate_ids(
        self, input_ids: Any, images: Any = (), *, options: GenerationOptions | None = None, **overrides: Any
    ) -> Result | list[Result]:
        """Continues token ids: `generate` without the template; a list of lists is a batch.

        Placeholders stand in the ids already expanded. Text is decoded if the bundle has a tokenizer.
        """
        chosen = self._options(options, overrides)
        if len(input_ids) == 0 or not isinstance(input_ids[0], (list, tuple, np.ndarray)):
            return self._generator.run([self._ids_request(input_ids, images, chosen)], chosen)[0]
        pairs = zip(input_ids, _groups(images, len(input_ids)), strict=True)
        return self._generator.run([self._ids_request(ids, group, chosen) for ids, group in pairs], chosen)

    def logits(self, input_ids: Sequence[int], images: Sequence[ImageInput] = ()) -> Logits:
        """Logits at every position of one sequence, float32 [sequence, vocab]; arguments as in `generate_ids`."""
        request = self._ids_request(input_ids, images, GenerationOptions(max_new_tokens=1))
        forward = self._generator.forward([request], self._generator.features([request]))
        ids = np.array([request.token_ids], np.int64)
        parts = []
        for start in range(0, ids.shape[1], decode.CHUNK):
            piece = ids[:, start : start + decode.CHUNK]
            parts.append(forward(piece, np.array([start + piece.shape[1]], np.int64), keep=0)[0])
        return np.concatenate(parts)

    def _options(self, options: GenerationOptions | None, overrides: Mapping[str, Any]) -> GenerationOptions:
        return (self.defaults if options is None else options).merged(**overrides)

    def _request(
        self,
        prompt: str | Messages,
        images: Sequence[ImageInput],
        system: str | None,
        tools: Messages | None,
        options: GenerationOptions,
    ) -> Request:
        scaled = self.requests.scaled(images)
        rendered = self.requests.prompt(prompt, scaled, system, tools, options.enable_thinking)
        return self.requests.of_prompt(rendered, scaled, options.max_new_tokens)

    def _ids_request(self, ids: Sequence[int], images: Sequence[ImageInput], options: GenerationOptions) -> Request:
        return self.requests.of_ids(ids, self.requests.scaled(images), options.max_new_tokens)


def _groups(images: Any, rows: int) -> list[Sequence[ImageInput]]:
    """A batch's images, one list for each row."""
    groups: list[Sequence[ImageInput]] = list(images) or [()] * rows
    if len(groups) != rows or not all(isinstance(group, (list, tuple)) for group in groups):
        why = f"a batch of {rows} needs as many lists of images"
        raise UsageError("cannot use images", "images", why, "Give a list for each, empty where there are none")
    return groups


def _eos_ids(raw: Mapping[str, Any]) -> frozenset[int]:
    value = raw.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        why = "eos_token_id is neither a token id nor a list of them"
        raise BundleError("damaged bundle", "generation_config.json", why, "Export the model again")
    return frozenset(values)
