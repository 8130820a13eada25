"""Passes of the text model on a device: what goes from graph to graph, or from step to step, stays there.

A prompt is read with shapes of its own. A step of one token has one shape for good: a mask as wide as the cache,
buffers whose addresses stay. So a GPU can record the step's launches once and replay them (CUDA graph); on the CPU the
same step runs without that. Per token the host sends ids and mask, and takes a token's id, or one row of logits.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np

from model.errors import ResourceError
from runtime.device import Device, Tensor, host_value
from runtime.device_cache import DeviceCache
from runtime.device_features import Features
from runtime.device_step import Step
from runtime.rows import Ids, Logits, RowPasses, kept
from runtime.sampling import Sampler, likeliest
from runtime.session import GraphSession

NEXT_IDS: Final = "next_ids"
# How often logits are looked at where only the likeliest id is taken: NaN must not go on for long.
_LOOK_EVERY: Final = 32
# One prompt is read in larger pieces than on the CPU: weights are unpacked once for each.
PIECE: Final = 2048
_RECORDINGS = itertools.count(1)
_log = logging.getLogger("exaone_export.runtime")


class DeviceForward(RowPasses):
    """Embedding and decoder over one cache on a device; calls are those of `runtime.forward.TextForward`.

    Args:
        decoder: the decoder's session.
        embedding: the embedding's session, or None where the decoder takes ids.
        device: where both compute.
        step: from an earlier request of as many rows, or a new one.
        features: for the placeholders in the prompts, row by row; they are used up in order.
        media_ids: ids of placeholders. One that comes when the features are used up is text.
        expected: tokens that the rows are likely to reach.

    Attributes:
        likeliest: int64 [rows], each row's likeliest next id, where `samplers` took over.
    """

    chunk = PIECE

    def __init__(
        self,
        decoder: GraphSession,
        embedding: GraphSession | None,
        device: Device,
        step: Step,
        features: Features | None = None,
        media_ids: Collection[int] = (),
        expected: int = 0,
    ) -> None:
        self._types = {tensor.name: tensor.dtype for tensor in decoder.graph.outputs}
        shapes = {tensor.name: tensor.shape for tensor in decoder.graph.outputs}
        super().__init__(decoder, step.cache, int(shapes["logits"][2]))
        step.cache.clear()
        self._embedding = embedding
        self._device = device
        self._step = step
        self._features = features
        self._media_ids = np.array(sorted(media_ids), np.int64)
        self._expected = expected
        self._takes_keep = decoder.has_input("logits_to_keep")
        self._reading: Any = None
        self._greedy = False
        self._looks = 0
        self.likeliest: Ids = np.zeros(step.cache.rows, np.int64)

    @property
    def cache_on_device(self) -> DeviceCache:
        """The cache, with what only a device's has."""
        return self._step.cache

    def samplers(self, samplers: Sequence[Sampler], plain: bool) -> list[Sampler]:
        """As given; but where only the likeliest ids are wanted and the graph tells them, no logits are taken."""
        self._greedy = plain and NEXT_IDS in self._types
        if not self._greedy:
            return list(samplers)
        return [self._taker(row) for row in range(self.cache.rows)]

    def _taker(self, row: int) -> Sampler:
        def take(logits: Logits, prompt_ids: Any, generated_ids: Any) -> int:
            return int(self.likeliest[row])

        return take

    def give(self, features: Features | None) -> None:
        """Replaces the features for placeholders to come."""
        self._features = features

    def _reserve(self, tokens: int) -> None:
        if self.cache.reserve(tokens, self._expected) or self._step.binding is None:
            self._bind_step()
        if self._reading is None:
            self._reading = self._decoder.binding()
            self.cache.bind(self._reading)

    def _one_by_one(self, ids: Ids, lengths: Ids, keep: int) -> Logits:
        greedy, self._greedy = self._greedy, False
        logits = super()._one_by_one(ids, lengths, keep)
        self._greedy = greedy
        if greedy:
            self.likeliest = logits[:, -1].argmax(-1).astype(np.int64)
        return logits

    def _pass(self, ids: Ids, lengths: Ids, keep: int, binding: Any = None) -> Logits:
        if binding is None:
            self._reserve(int(lengths.max()))
            if ids.shape[1] == 1:
                return self._one_token(ids, lengths)
            binding = self._reading
        return self._read(ids, lengths, keep, binding)

    def _read(self, ids: Ids, lengths: Ids, keep: int, binding: Any) -> Logits:
        """A pass of any shape; nothing of it is recorded."""
        total = int(lengths.max())
        # The binding only borrows these; they live until the run is over.
        mask = (np.arange(total) < lengths[:, None]).astype(np.int64)
        name, inputs = self._embedded(ids)
        self._device.bind_input(binding, name, inputs)
        binding.bind_cpu_input("attention_mask", mask)
        if self._takes_keep:
            binding.bind_ortvalue_input("logits_to_keep", host_value(np.array([keep], np.int64), "int64"))
        results = self._results(len(ids), kept(keep, ids.shape[1]))
        for output, tensor in results.items():
            self._device.bind_output(binding, output, tensor)
        self._decoder.run_bound(binding)
        return self._taken(results, look=True)

    def _embedded(self, ids: Ids) -> tuple[str, Tensor]:
        """The decoder's input for new tokens, on the device."""
        given = self._device.put(np.ascontiguousarray(ids, np.int64))
        if self._embedding is None:
            return "input_ids", given
        binding, output = self._embedding.binding(), self._embedding.graph.outputs[0]
        media = int(np.isin(ids, self._media_ids).sum()) if self._features is not None and self._features.left else 0
        self._device.bind_input(binding, "input_ids", given)
        self._device.bind_input(binding, "image_features", self._features_of(media))
        made = self._device.empty((*ids.shape, int(output.shape[2])), output.dtype)
        self._device.bind_output(binding, output.name, made)
        self._embedding.run_bound(binding)
        return output.name, made

    def _features_of(self, count: int) -> Tensor:
        if count and self._features is not None:
            return self._features.take(count)
        if self._embedding is None:
            raise ValueError("only an embedding takes features")
        info = next(tensor for tensor in self._embedding.graph.inputs if tensor.name == "image_features")
        # An address is needed even where nothing is read.
        return self._device.empty((1, int(info.shape[1])), info.dtype).part(0, 0)

    def _results(self, rows: int, positions: int) -> dict[str, Tensor]:
        """What a pass writes: logits, and ids where only they are asked for."""
        results = {"logits": self._device.empty((rows, positions, self._vocab), self._types["logits"])}
        if NEXT_IDS in self._types:
            results[NEXT_IDS] = self._device.empty((rows, positions), self._types[NEXT_IDS])
        return results

    def _taken(self, results: dict[str, Tensor], look: bool) -> Logits:
        """What the caller is given, [rows, kept, vocab]; of a greedy step only one number that is always finite."""
        if not self._greedy:
            return self._device.read(results["logits"]).astype(np.float32, copy=False)
        ids = self._device.read(results[NEXT_IDS])
        if look:
            for row in self._device.read(results["logits"]).astype(np.float32, copy=False)[:, -1]:
                likeliest(row, (), ())
        self.likeliest = ids[:, -1].copy()
        return np.zeros((len(ids), 1, 1), np.float32)

    def _bind_step(self) -> None:
        """Makes the step's buffers for the cache as it is now; what was recorded on the old ones is forgotten."""
        step, device, rows = self._step, self._device, self.cache.rows
        if step.recording is not None:
            self._decoder.forget(step.recording)
            step.recording = None
        self._reading = None
        step.sent.clear()
        step.mask = np.zeros((rows, self.cache.capacity), np.int64)
        step.marked = [0] * rows
        step.tensors = {
            "input_ids": device.empty((rows, 1), "int64"),
            "attention_mask": device.put(step.mask),
            **self._results(rows, 1),
        }
        step.binding = self._decoder.binding()
        if self._takes_keep:
            # A number that never changes is brought where it is read once, when it is bound.
            step.binding.bind_ortvalue_input("logits_to_keep", host_value(np.ones(1, np.int64), "int64"))
        if self._embedding is not None:
            self._bind_embedding(self._embedding)
        for info in self._decoder.graph.inputs:
            if info.name in step.tensors and self._decoder.reads_on_device(info.name):
                device.bind_input(step.binding, info.name, step.tensors[info.name])
            elif info.name in step.tensors:
                step.sent[info.name] = step.binding
        for name in self._results_of_step():
            device.bind_output(step.binding, name, step.tensors[name])
        self.cache.bind(step.binding)

    def _results_of_step(self) -> list[str]:
        return [name for name in ("logits", NEXT_IDS) if name in self._step.tensors]

    def _bind_embedding(self, embedding: GraphSession) -> None:
        step, output = self._step, embedding.graph.outputs[0]
        step.embedding = embedding.binding()
        step.tensors["image_features"] = self._features_of(0)
        step.tensors[output.name] = self._device.empty((self.cache.rows, 1, int(output.shape[2])), output.dtype)
        self._device.bind_input(step.embedding, "image_features", step.tensors["image_features"])
        if embedding.reads_on_device("input_ids"):
            self._device.bind_input(step.embedding, "input_ids", step.tensors["input_ids"])
        else:
            step.sent["input_ids"] = step.embedding
        self._device.bind_output(step.embedding, output.name, step.tensors[output.name])

    def _one_token(self, ids: Ids, lengths: Ids) -> Logits:
        """A step of one token for every row, always of the same shapes and at the same addresses."""
        step, device = self._step, self._device
        self._mark(lengths)
        for name, array in (("input_ids", np.ascontiguousarray(ids, np.int64)), ("attention_mask", step.mask)):
            if name in step.sent:
                step.sent[name].bind_cpu_input(name, array)
            else:
                device.write(step.tensors[name], array)
        if self._embedding is not None:
            features = self._placed(ids)
            if features is not None:
                device.bind_input(step.embedding, "image_features", features)
            self._embedding.run_bound(step.embedding)
            if features is not None:
                device.bind_input(step.embedding, "image_features", step.tensors["image_features"])
        self._run_step()
        self._looks += 1
        results = {name: step.tensors[name] for name in self._results_of_step()}
        return self._taken(results, look=self._looks % _LOOK_EVERY == 1)

    def _placed(self, ids: Ids) -> Tensor | None:
        """Features for placeholders that are read one by one."""
        if self._features is None or not self._features.left:
            return None
        media = int(np.isin(ids, self._media_ids).sum())
        return self._features.take(media) if media else None

    def _mark(self, lengths: Ids) -> None:
        """Brings the mask to the rows' lengths; mostly one number changes."""
        step = self._step
        for row, (old, new) in enumerate(zip(step.marked, lengths.tolist(), strict=True)):
            step.mask[row, min(old, new) : max(old, new)] = new > old
            step.marked[row] = new

    def _run_step(self) -> None:
        step = self._step
        if not step.records or not self._decoder.captures or "attention_mask" in step.sent:
            self._decoder.run_bound(step.binding)
        elif step.recording is not None and step.thread == threading.get_ident():
            self._decoder.run_bound(step.binding, record=step.recording)
        else:
            self._record()

    def _record(self) -> None:
        """The first step at new addresses, or in another thread, as recordings belong to threads.

        To record, the step is done several times. That changes nothing but where full windows move on with each;
        those are put back, and the step is done once more.
        """
        step = self._step
        saved: list[Any] = []
        if step.cache.windows_full:
            try:
                saved = step.cache.saved_windows()
            except ResourceError:
                _log.info("no memory to record a step beside %d full windows; going on without", step.cache.rows)
                step.records = False
                self._decoder.run_bound(step.binding)
                return
        step.recording, step.thread = next(_RECORDINGS), threading.get_ident()
        self._decoder.run_bound(step.binding, record=step.recording)
        if saved:
            step.cache.restore(saved)
            self._decoder.run_bound(step.binding)
