"""One generation: several requests side by side through the bundle's graphs, until every row has its result."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import numpy as np

from model.bundle import DECODER, int8_cache
from model.errors import UsageError
from model.progress import Progress
from runtime import decode, speculation
from runtime.boxed import boxed
from runtime.choosing import Chooser, make_choosers
from runtime.constraint import Constraints, Vocabulary
from runtime.device_features import Features
from runtime.feature_cache import FeatureCache
from runtime.graphs import Graphs
from runtime.image_runs import image_runs
from runtime.options import GenerationOptions
from runtime.request import Request, RequestBuilder
from runtime.reuse import KeptRow
from runtime.rows import Ids, Logits, RowPasses
from runtime.sampling import likeliest
from runtime.session import Array
from runtime.speculation import LOOKUP, MTP, Drafts
from runtime.speculation_pace import Pace
from runtime.speculation_said import Said
from runtime.tokenizer import Tokenizer
from runtime.transcript import Event, Result, Timings, Transcript


class Generator:
    """Runs requests.

    Args:
        graphs: the bundle's graphs.
        builder: for its tokenizer and image processor.
        eos_ids: ids that end a turn.
        progress: told of reading images and long prompts.

    Attributes:
        progress: as given.
        features_of: for rows that stay; what they see is encoded once.
    """

    def __init__(self, graphs: Graphs, builder: RequestBuilder, eos_ids: Collection[int], progress: Progress) -> None:
        self._graphs = graphs
        self._builder = builder
        self._eos_ids = eos_ids
        self.progress = progress
        self.features_of = FeatureCache(graphs, builder.media, progress)
        self._constraints = Constraints(partial(_vocabulary, graphs, builder, eos_ids))
        self._pace = Pace()
        self._said = Said()

    def check(self, options: GenerationOptions) -> None:
        """Refuses a schema, expression or grammar that cannot be held, before anything is run."""
        self._constraints.rows(options, [False])

    def run(self, requests: Sequence[Request], options: GenerationOptions) -> list[Result]:
        """All results, in order."""
        results = {event.row: event.result for event in self.events(requests, options) if event.result is not None}
        return [results[row] for row in range(len(requests))]

    def events(
        self,
        requests: Sequence[Request],
        options: GenerationOptions,
        row_for: Callable[[Request], KeptRow] | None = None,
    ) -> Iterator[Event]:
        """Runs the rows together; an event for every token, a row's last one with its result.

        Args:
            requests: one for each row.
            options: of all of them.
            row_for: for a single request, gives the row that it goes on with; None reads everything anew.
        """
        self._graphs.open(images=any(request.images for request in requests))
        began = time.perf_counter()
        forward = row_for(requests[0]) if row_for else self.forward(requests, self.features(requests))
        choosers, rows = self.begin(requests, options)
        ended: set[int] = set()
        started, first = time.perf_counter(), 0.0
        drafts = self._drafts(options) if len(requests) == 1 else None
        steps = self._steps(forward, requests, choosers, drafts, ended)
        for step in steps:
            now = time.perf_counter()
            first = first or now
            for token in step:
                transcript, chooser, result = rows[token.row], choosers[token.row], None
                pieces = transcript.feed(token.id)
                finish = "stop" if transcript.stopped or chooser.complete else token.finish
                if finish is not None:
                    ended.add(token.row)
                    pieces += transcript.finish()
                    times = (started - began, first - started, now - first)
                    if drafts is not None:
                        steps.close()  # the last pass belongs to the account
                        self._said.add(transcript.token_ids)
                    result = self.result(transcript, chooser, requests[token.row], finish, times, drafts)
                yield Event(token.row, token.id, pieces, result, chooser.last_told)

    def _steps(
        self,
        forward: RowPasses | KeptRow,
        requests: Sequence[Request],
        choosers: Sequence[Chooser],
        drafts: Drafts | None,
        ended: Collection[int],
    ) -> abc.Generator[list[decode.Token]]:
        """Tokens as they come, drafted or not."""
        plain = drafts is None and all(chooser.takes_likeliest for chooser in choosers)
        samplers = forward.samplers(choosers, plain)
        reading, pad = self._with_progress(forward, requests), self._graphs.pad_id
        if drafts is None:
            prompts, limits = [request.token_ids for request in requests], [request.limit for request in requests]
            yield from decode.generate(reading, prompts, samplers, limits, self._eos_ids, pad, ended, forward.chunk)
            return
        head = drafts.head
        try:
            if head is not None and not forward.watch(head.watch):
                drafts.head = None
            yield from speculation.generate(
                forward,
                requests[0].token_ids,
                likeliest if choosers[0].takes_likeliest else samplers[0],
                requests[0].limit,
                self._eos_ids,
                drafts,
                ended,
                lambda ids: decode.prefill(reading, [ids[0]], pad, forward.chunk),
            )
        finally:
            forward.watch(None)
            if head is not None:
                drafts.head = None
                self._graphs.keep_head(head)

    def _drafts(self, options: GenerationOptions) -> Drafts | None:
        """Where drafts come from; None for plain decoding."""
        wanted, most = options.speculate, options.draft_tokens
        if wanted == "off" or int8_cache(self._graphs.manifest.graph(DECODER)):
            # Of 8 bits, one token is attended to in integers and several in floats: not the same answers.
            return None
        head = self._graphs.draft_head() if wanted != LOOKUP else None
        if wanted == MTP and head is None:
            why = "the bundle has no draft head that runs here"
            raise UsageError("cannot draft", "speculate", why, "Use lookup or auto")
        # Who names a number gets that many; else as many as pay, and one at least where a source is named.
        pace = self._pace if wanted == "auto" or most is None else None
        return Drafts(pace, head, wanted != MTP, most, self._said, least=int(wanted != "auto"))

    def begin(self, requests: Sequence[Request], options: GenerationOptions) -> tuple[list[Chooser], list[Transcript]]:
        """What chooses each row's tokens, and what they become."""
        tokenizer = self._builder.tokenizer if self._builder.has_tokenizer else None
        thinking = [request.thinking for request in requests]
        choosers = make_choosers(options, self._constraints.rows(options, thinking), tokenizer)
        return choosers, [_transcript(tokenizer, options, request) for request in requests]

    def features(self, requests: Sequence[Request]) -> Array | Features | None:
        """Features of all images and videos, small ones encoded together, in the order of their placeholders."""
        media, vision, features = self._builder.media, self._graphs.config.vision, []
        images = [piece for request in requests for medium in request.images for piece in media.pieces(medium)]
        if not images or vision is None:
            return None
        into = self._graphs.features_on_device(sum(request.image_tokens for request in requests))
        self.progress.start("reading images", len(images), "images")
        for run in image_runs(images, vision.patch_size):
            parts, grids = zip(*map(media.patches, run), strict=True)
            values = np.concatenate(parts)
            tokens = len(values) // vision.spatial_merge_size**2
            if into is None:
                features.append(self._graphs.encode(values, np.concatenate(grids), tokens))
            else:
                self._graphs.encode_onto(into, values, np.concatenate(grids), tokens)
            self.progress.advance(len(run))
        self.progress.finish()
        return np.concatenate(features) if into is None else into

    def forward(self, requests: Sequence[Request], features: Array | Features | None) -> RowPasses:
        """The text model with an empty cache for these rows."""
        return self._graphs.forward(len(requests), features, max(request.expected for request in requests))

    def result(
        self,
        transcript: Transcript,
        chooser: Chooser,
        request: Request,
        finish: decode.FinishReason,
        times: tuple[float, float, float],
        drafts: Drafts | None = None,
    ) -> Result:
        """A finished row's result; `times` are seconds of reading images, of reading the prompt, and of the answer."""
        reasoning, content = transcript.parts()
        vision_s, prefill_s, decode_s = times
        rate = (len(transcript.token_ids) - 1) / decode_s if decode_s > 0 else 0.0
        warnings = [f"{content.fault}; it was left in the text"] if content.fault else []
        if chooser.constraint is not None and not chooser.constraint.matches:
            cut = "at its longest" if finish == "length" else "by a stop string"
            warnings.append(f"the answer was ended {cut}, before it was complete under its constraint")
        return Result(
            text=content.text,
            reasoning=reasoning,
            tool_calls=content.calls,
            token_ids=transcript.token_ids,
            prompt_tokens=len(request.token_ids),
            image_tokens=request.image_tokens,
            finish_reason="tool_calls" if content.calls and finish == "stop" else finish,
            ep=self._graphs.ep,
            timings=Timings(
                self._graphs.load_s,
                vision_s if request.images else 0.0,
                prefill_s,
                decode_s,
                rate,
                drafts.account() if drafts is not None else None,
            ),
            boxed=boxed(content.text),
            logprobs=chooser.told(len(transcript.token_ids)),
            warnings=warnings,
        )

    def _with_progress(self, forward: RowPasses | KeptRow, requests: Sequence[Request]) -> decode.Forward:
        """Shows the reading of a prompt that takes several passes."""
        total = len(requests[0].token_ids)
        if len(requests) > 1 or total <= forward.chunk:
            return forward
        self.progress.start("reading prompt", total, "tokens")

        def run(ids: Ids, lengths: Ids) -> Logits:
            logits = forward(ids, lengths)
            if lengths[0] <= total:
                self.progress.advance(ids.shape[1])
            if lengths[0] == total:
                self.progress.finish()
            return logits

        return run


def _vocabulary(graphs: Graphs, builder: RequestBuilder, eos_ids: Collection[int]) -> Vocabulary:
    if not builder.has_tokenizer:
        why = "the bundle has none, and a constraint is about text"
        raise UsageError("cannot constrain the answer", "tokenizer.json", why, "Add the model's tokenizer")
    return Vocabulary(builder.tokenizer, graphs.config.text.vocab_size, eos_ids)


def _transcript(tokenizer: Tokenizer | None, options: GenerationOptions, request: Request) -> Transcript:
    """JSON that a schema allows is the answer even where it has tags in it."""
    free = options.json_schema is None
    held = not free or options.regex is not None or options.grammar is not None
    return Transcript(tokenizer, options.stop, request.thinking, answer_only=held, calls=free)
