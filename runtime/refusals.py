"""Methods that a bundle does not have, because it was exported for another task, each with an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from model.errors import UsageError
from model.tasks import (
    FEATURE_EXTRACTION,
    GENERATION,
    IMAGE_FEATURE_EXTRACTION,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
)

METHODS = {
    **dict.fromkeys(GENERATION, "generate"),
    FEATURE_EXTRACTION: "features",
    IMAGE_FEATURE_EXTRACTION: "image_features",
    TEXT_CLASSIFICATION: "classify",
    TOKEN_CLASSIFICATION: "classify_tokens",
    QUESTION_ANSWERING: "answer",
}


def wrong_task(method: str, task: str) -> UsageError:
    """The error for a method that a bundle of `task` does not have."""
    why = f"the bundle was exported for {task}"
    return UsageError("wrong task", method, why, f"Use its method {METHODS[task]}, or another bundle")


def _refused(method: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *_: object, **__: object) -> NoReturn:
        raise wrong_task(method, self.task)

    refuse.__name__, refuse.__doc__ = method, "Raises UsageError: the bundle was exported for another task."
    return refuse


class RefusesGeneration:
    """What `runtime.engine.Engine` does, for a bundle that does not generate."""

    prompt = _refused("prompt")
    generate = _refused("generate")
    stream = _refused("stream")
    generate_ids = _refused("generate_ids")
    logits = _refused("logits")


class RefusesEncoding:
    """What `runtime.encoder.Encoder` does, for a bundle that generates."""

    features = _refused("features")
    image_features = _refused("image_features")
    classify = _refused("classify")
    classify_tokens = _refused("classify_tokens")
    answer = _refused("answer")
    run = _refused("run")
