"""One generation: several requests side by side through the bundle's graphs, until every row has its result."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from model.progress import Progress
from runtime import decode
from runtime.forward import Ids, Logits, TextForward
from runtime.graphs import Graphs
from runtime.image_runs import image_runs
from runtime.options import GenerationOptions
from runtime.request import Request, RequestBuilder
from runtime.sampling import make_samplers
from runtime.session import Array
from runtime.transcript import Event, Result, Timings, Transcript

# Room made in the cache at first; answers are mostly shorter than what they may be.
_USUAL_ANSWER = 512


class Generator:
    """Runs requests.

    Args:
        graphs: the bundle's graphs.
        builder: for its tokenizer and image processor.
        eos_ids: ids that end a turn.
        progress: told of reading images and long prompts.
    """

    def __init__(self, graphs: Graphs, builder: RequestBuilder, eos_ids: Collection[int], progress: Progress) -> None:
        self._graphs = graphs
        self._builder = builder
        self._eos_ids = eos_ids
        self._progress = progress

    def run(self, requests: Sequence[Request], options: GenerationOptions) -> list[Result]:
        """All results, in order."""
        results = {event.row: event.result for event in self.events(requests, options) if event.result is not None}
        return [results[row] for row in range(len(requests))]

    def events(self, requests: Sequence[Request], options: GenerationOptions) -> Iterator[Event]:
        """Runs the rows together; an event for every token, a row's last one with its result."""
        self._graphs.open(images=any(request.images for request in requests))
        began = time.perf_counter()
        features = self.features(requests)
        forward = self.forward(requests, features)
        tokenizer = self._builder.tokenizer if self._builder.has_tokenizer else None
        rows = [Transcript(tokenizer, options.stop, request.thinking) for request in requests]
        ended: set[int] = set()
        started, first = time.perf_counter(), 0.0
        steps = decode.generate(
            self._with_progress(forward, requests),
            [request.token_ids for request in requests],
            make_samplers(options, len(requests)),
            [request.limit for request in requests],
            self._eos_ids,
            self._graphs.pad_id,
            ended,
        )
        for step in steps:
            now = time.perf_counter()
            first = first or now
            for token in step:
                transcript, request, result = rows[token.row], requests[token.row], None
                pieces = transcript.feed(token.id)
                finish = "stop" if transcript.stopped else token.finish
                if finish is not None:
                    ended.add(token.row)
                    pieces += transcript.finish()
                    times = (started - began, first - started, now - first)
                    result = self._result(transcript, request, finish, times)
                yield Event(token.row, token.id, pieces, result)

    def features(self, requests: Sequence[Request]) -> Array | None:
        """Features of all images, small ones encoded together."""
        images = [image for request in requests for image in request.images]
        if not images:
            return None
        processor, features = self._builder.image_processor, []
        self._progress.start("reading images", len(images), "images")
        for run in image_runs(images, processor):
            values, grids = zip(*map(processor.patches, run), strict=True)
            tokens = sum(map(processor.token_count, run))
            features.append(self._graphs.encode(np.concatenate(values), np.concatenate(grids), tokens))
            self._progress.advance(len(run))
        self._progress.finish()
        return np.concatenate(features)

    def forward(self, requests: Sequence[Request], features: Array | None) -> TextForward:
        """The text model with an empty cache for these rows."""
        expected = max(len(request.token_ids) + min(request.limit, _USUAL_ANSWER) for request in requests)
        return self._graphs.forward(len(requests), features, expected)

    def _result(
        self, transcript: Transcript, request: Request, finish: decode.FinishReason, times: tuple[float, float, float]
    ) -> Result:
        text, reasoning, calls = transcript.parts()
        vision_s, prefill_s, decode_s = times
        rate = (len(transcript.token_ids) - 1) / decode_s if decode_s > 0 else 0.0
        return Result(
            text=text,
            reasoning=reasoning,
            tool_calls=calls,
            token_ids=transcript.token_ids,
            prompt_tokens=len(request.token_ids),
            image_tokens=request.image_tokens,
            finish_reason=finish,
            ep=self._graphs.ep,
            timings=Timings(self._graphs.load_s, vision_s if request.images else 0.0, prefill_s, decode_s, rate),
        )

    def _with_progress(self, forward: TextForward, requests: Sequence[Request]) -> decode.Forward:
        """Shows the reading of a prompt that takes several passes."""
        total = len(requests[0].token_ids)
        if len(requests) > 1 or total <= decode.CHUNK:
            return forward
        self._progress.start("reading prompt", total, "tokens")

        def run(ids: Ids, lengths: Ids) -> Logits:
            logits = forward(ids, lengths)
            if lengths[0] <= total:
                self._progress.advance(ids.shape[1])
            if lengths[0] == total:
                self._progress.finish()
            return logits

        return run
