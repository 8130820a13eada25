"""Runs a bundle that does not generate: features, labels and answers out of texts and images.

Texts go through the tokenizer alone, without chat template, as in transformers' pipelines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.errors import UsageError
from model.progress import Progress
from model.tasks import (
    FEATURE_EXTRACTION,
    GENERATION,
    IMAGE_FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)
from runtime.answers import Answer, Classification, TokenLabel, best_span, classification, token_labels, trimmed
from runtime.encoder_inputs import (
    RowBuilder,
    TextInput,
    TextInputs,
    check_fits,
    check_last_tokens,
    checked_ids,
    checked_mask,
    is_single,
    spans_of,
)
from runtime.encoder_pass import EncoderPass
from runtime.execution import Execution
from runtime.graphs import Graphs
from runtime.opened import Opened
from runtime.refusals import RefusesGeneration, wrong_task
from runtime.request import ImageInput, RequestBuilder

Floats = npt.NDArray[np.float32]

LONGEST_ANSWER = 15  # tokens, as in transformers' pipeline


class Encoder(Opened, RefusesGeneration):
    """A bundle ready to encode. Not for use by two threads at once.

    Make one with `Encoder.load`; close it, or use it as a context manager, to free its memory. A method that the
    bundle was not exported for raises UsageError.

    Attributes:
        graphs: the bundle's graphs, its manifest and its configuration.
        requests: the bundle's tokenizer and image processor.
        task: what the bundle is for.
        labels: names of a classifier's outputs; elsewhere they have no meaning.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self.task = graphs.config.task
        if self.task in GENERATION:
            raise wrong_task("encode", self.task)
        self.labels = graphs.config.labels.names
        self.requests = RequestBuilder(graphs.folder, graphs.config)
        self._rows = RowBuilder(self.requests, graphs.config)
        self._passes = EncoderPass(graphs, self.requests)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        ep: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
        execution: Execution | None = None,
    ) -> Self:
        """Opens a bundle; arguments and errors are those of `runtime.engine.Engine.load`."""
        return cls(Graphs(Path(folder), ep, threads, progress, execution))

    @overload
    def features(self, texts: TextInput, images: Sequence[ImageInput] = ()) -> Floats: ...

    @overload
    def features(self, texts: TextInputs, images: Sequence[Sequence[ImageInput]] = ()) -> list[Floats]: ...

    def features(self, texts: Any, images: Any = ()) -> Floats | list[Floats]:
        """The last hidden states of texts, float32 [tokens, hidden] of each, without padding.

        Args:
            texts: a text, token ids, or a list of either.
            images: for a model that sees, those of the text, or one list for each text, in the order of the
                placeholders. A text has one placeholder for each, as transformers' processor wants it
                (``<|image_pad|>`` in EXAONE 4.5); in token ids they stand already expanded.

        Raises:
            UsageError: a text or image cannot be used, or they do not fit together.
            BundleError: the bundle is damaged.
            ResourceError: not enough memory.
            NumericalError: the model gives NaN or Inf.
        """
        self._want("features", FEATURE_EXTRACTION)
        single = is_single(texts)
        rows, groups = ([texts], [images]) if single else (list(texts), list(images) or [()] * len(texts))
        if len(groups) != len(rows):
            why = f"{len(rows)} texts need as many lists of images, {len(groups)} are given"
            raise UsageError("cannot use images", "images", why, "Give a list for each, empty where there are none")
        scaled = [self.requests.scaled(group) if len(group) else () for group in groups]
        ids = [self._rows.ids(row, f"texts[{i}]", images=scaled[i]) for i, row in enumerate(rows)]
        found = self._passes.rows(ids, lambda out, row, mask: out["last_hidden_state"][row, : mask.sum()], scaled)
        return found[0] if single else found

    @overload
    def image_features(self, images: ImageInput) -> Floats: ...

    @overload
    def image_features(self, images: list[Any]) -> list[Floats]: ...

    def image_features(self, images: Any) -> Floats | list[Floats]:
        """What the vision encoder makes of images, float32 [image tokens, hidden] of each; one alone needs no list.

        Raises:
            UsageError: an image cannot be used, or the bundle has no vision encoder.
            BundleError, ResourceError, NumericalError: as `features`.
        """
        if self.graphs.config.vision is None:
            raise wrong_task("image_features", self.task)
        single = isinstance(images, (str, os.PathLike, Image.Image, np.ndarray))
        found = [self._passes.image(image) for image in self.requests.scaled([images] if single else images)]
        return found[0] if single else found

    @overload
    def classify(self, texts: TextInput, text_pair: str | None = None) -> Classification: ...

    @overload
    def classify(self, texts: TextInputs, text_pair: Sequence[str] | None = None) -> list[Classification]: ...

    def classify(self, texts: Any, text_pair: Any = None) -> Classification | list[Classification]:
        """Labels texts, with scores as transformers' pipeline gives them.

        Args:
            texts: a text, token ids, or a list of either.
            text_pair: a second text, or a list of them, for a model that compares two.

        Raises:
            UsageError, BundleError, ResourceError, NumericalError: as `features`.
        """
        self._want("classify", TEXT_CLASSIFICATION)
        single = is_single(texts)
        rows, pairs = ([texts], [text_pair]) if single else (list(texts), text_pair or [None] * len(texts))
        if isinstance(pairs, str) or len(pairs) != len(rows):
            raise UsageError("cannot use texts", "text_pair", "it does not have one text for each of texts")
        ids = [self._rows.ids(row, f"texts[{i}]", pair=pairs[i]) for i, row in enumerate(rows)]
        config = self.graphs.config
        # Without a padding token the model looks at the last column, which must then be the text's own.
        found = self._passes.rows(
            ids,
            lambda out, row, _: classification(out["logits"][row], config.labels),
            together=config.pad_token_id is not None,
        )
        return found[0] if single else found

    @overload
    def classify_tokens(self, texts: str) -> tuple[TokenLabel, ...]: ...

    @overload
    def classify_tokens(self, texts: list[str]) -> list[tuple[TokenLabel, ...]]: ...

    def classify_tokens(self, texts: Any) -> tuple[TokenLabel, ...] | list[tuple[TokenLabel, ...]]:
        """Labels every token of a text, or of each of a list of texts, but those that the tokenizer adds.

        Raises:
            UsageError, BundleError, ResourceError, NumericalError: as `features`.
        """
        self._want("classify_tokens", TOKEN_CLASSIFICATION)
        single = isinstance(texts, str)
        rows: list[str] = [texts] if single else list(texts)
        encodings = [self._rows.encoding(f"texts[{i}]", row) for i, row in enumerate(rows)]
        ids = [encoding.ids for encoding in encodings]
        logits = self._passes.rows(ids, lambda out, row, mask: out["logits"][row, : mask.sum()])
        labels = self.graphs.config.labels
        found = [
            token_labels(scores, labels, row, spans_of(encoding))
            for scores, row, encoding in zip(logits, rows, encodings, strict=True)
        ]
        return found[0] if single else found

    def answer(self, question: str, context: str, *, max_answer_tokens: int = LONGEST_ANSWER) -> Answer:
        """The part of `context` that answers `question`, without white space at its ends.

        The two are tokenized apart and joined, the question first; the context is first where
        ``tokenizer_config.json`` has padding_side "left". transformers' pipeline, while it had one, and its training
        script do the same.

        Args:
            question: what is asked.
            context: where the answer is.
            max_answer_tokens: tokens that the answer may have.

        Raises:
            UsageError, BundleError, ResourceError, NumericalError: as `features`.
        """
        self._want("answer", QUESTION_ANSWERING)
        if max_answer_tokens < 1:
            raise UsageError("cannot answer", "max_answer_tokens", f"{max_answer_tokens} is below 1")
        for name, text in (("question", question), ("context", context)):
            if not text:
                raise UsageError("cannot answer", name, "it is empty")
        part = 0 if self.requests.tokenizer.padding_side == "left" else 1  # of the context
        joined = self._rows.encoding("question and context", *((question, context) if part else (context, question)))
        inside = np.array([of == part for of in joined.parts])
        if not inside.any():
            raise UsageError("cannot answer", "context", "it has no tokens")
        [(start, end)] = self._passes.rows(
            [joined.ids], lambda out, row, _: (out["start_logits"][row, inside], out["end_logits"][row, inside])
        )
        first, last, score = best_span(start, end, max_answer_tokens)
        spans = [span for span, wanted in zip(joined.offsets, inside, strict=True) if wanted]
        return trimmed(context, spans[first][0], spans[last][1], score)

    def run(
        self,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
    ) -> dict[str, Floats]:
        """The graphs' outputs for arrays such as transformers' models take.

        Args:
            input_ids: whole numbers [batch, sequence].
            attention_mask: 0 or 1 [batch, sequence], padding on either side; None is all ones. What the outputs say of
                padding has no meaning.
            pixel_values: numbers [patches, patch width], of all images.
            image_grid_thw: whole numbers [images, 3], frames, rows and columns of patches of each.

        Returns:
            float32 by name: ``last_hidden_state`` [batch, sequence, hidden], ``logits`` [batch, labels] or [batch,
            sequence, labels], ``start_logits`` and ``end_logits`` [batch, sequence], or ``image_features`` [image
            tokens, hidden].

        Raises:
            UsageError: an array is missing, not wanted, or cannot be used.
            BundleError, ResourceError, NumericalError: as `features`.
        """
        config, features = self.graphs.config, None
        if pixel_values is not None or image_grid_thw is not None:
            features = self._passes.patches(pixel_values, image_grid_thw)
        if self.task == IMAGE_FEATURE_EXTRACTION:
            if features is None or input_ids is not None or attention_mask is not None:
                raise UsageError("cannot run", "inputs", f"{self.task} takes pixel_values and image_grid_thw")
            return {"image_features": features}
        if input_ids is None:
            raise UsageError("cannot run", "inputs", f"{self.task} takes input_ids and attention_mask")
        ids = checked_ids(input_ids, config.text.vocab_size)
        mask = checked_mask(attention_mask, ids)
        check_fits(ids.shape[1], self.graphs.context, "input_ids")
        if self.task == TEXT_CLASSIFICATION:
            check_last_tokens(ids, mask, config.pad_token_id)
        return self._passes(ids, mask, features)

    def _want(self, method: str, task: str) -> None:
        if self.task != task:
            raise wrong_task(method, self.task)
