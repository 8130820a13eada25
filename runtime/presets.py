"""Which of the model card's sampling values an answer is drawn with, where the caller does not say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from model.errors import UsageError
from runtime.options import GREEDY_BELOW, PRESETS, GenerationOptions

AUTO: Final = "auto"
NONE: Final = "none"
_HANGUL: Final = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_DEFAULT: Final = GenerationOptions()
# Keys of generation_config.json that say how to draw.
_DRAWING: Final = ("do_sample", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")


@dataclass(frozen=True)
class Kind:
    """What an answer is about.

    Attributes:
        model_type: of config.json.
        media: whether there are images or videos.
        korean: whether the last user turn has Hangul.
        thinking: whether reasoning was asked for; None = the template's default.
    """

    model_type: str
    media: bool = False
    korean: bool = False
    thinking: bool | None = None

    @property
    def preset(self) -> str | None:
        """The preset by the model cards; None where they advise nothing, and decoding is greedy.

        EXAONE 4.5: text alone is "text", with images it is "general", and "document" if asked in Korean, as the card
        has one line for documents and Korean. A document in an image cannot be told from another image. EXAONE 4.0:
        "reasoning" where thinking was asked for, else temperatures near 0.
        """
        if self.model_type == "exaone4_5":
            return ("document" if self.korean else "general") if self.media else "text"
        return "reasoning" if self.thinking else None


def kind_of(model_type: str, prompt: object, images: object, thinking: bool | None) -> Kind:
    """The kind of a prompt with its images and videos, or of a batch; anything unusable is refused elsewhere.

    Args:
        model_type: of config.json.
        prompt: a text, a conversation, or a list of either.
        images: whatever is given of images and videos, in lists of any depth.
        thinking: whether reasoning was asked for; None = the template's default.
    """
    return Kind(model_type, _any_media(images), _HANGUL.search(_last_words(prompt)) is not None, thinking)


def says_how_to_draw(generation_config: Mapping[str, Any]) -> bool:
    """Whether a bundle's generation_config.json has sampling values of its own, "greedy" included."""
    return any(generation_config.get(name) is not None for name in _DRAWING)


def resolve(
    name: str | None,
    kind: Kind,
    defaults: GenerationOptions,
    options: GenerationOptions | None,
    overrides: Mapping[str, Any],
) -> tuple[str | None, GenerationOptions]:
    """The preset taken, None for none, and the options that hold.

    Single values go before the preset's, whether given in `options` or as `overrides`; asking for greedy decoding (no
    sampling, or a temperature of 0) leaves the preset out altogether, its penalty too.

    Args:
        name: a preset; "auto" for the kind's own; None or "none" for none.
        kind: of the prompt.
        defaults: what holds without preset and options.
        options: what the caller gives instead of the defaults.
        overrides: single options by name.

    Raises:
        UsageError: there is no such preset, or an option is unknown or refused.
    """
    if name not in (None, AUTO, NONE, *PRESETS):
        known = ", ".join((AUTO, NONE, *PRESETS))
        raise UsageError("bad option", "preset", f"{str(name)[:40]!r} is not known", f"Known: {known}")
    plain = (defaults if options is None else options).merged(**overrides)
    chosen = kind.preset if name == AUTO else name
    if chosen in (None, NONE) or _greedy(options, overrides):
        return None, plain
    start = PRESETS[str(chosen)]
    if options is not None:
        fields = [field.name for field in dataclasses.fields(options)]
        given = {key: getattr(options, key) for key in fields if getattr(options, key) != getattr(_DEFAULT, key)}
        start = dataclasses.replace(start, **given)
    return chosen, start.merged(**overrides)


def _greedy(options: GenerationOptions | None, overrides: Mapping[str, Any]) -> bool:
    asked = (options or _DEFAULT).merged(**overrides)
    return asked.do_sample is False or (asked.temperature is not None and asked.temperature < GREEDY_BELOW)


def _any_media(given: object) -> bool:
    return any(map(_any_media, given)) if isinstance(given, (list, tuple)) else given is not None


def _last_words(prompt: object) -> str:
    """The text of the last user turn, or of all prompts of a batch."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence):
        return ""
    if any(not isinstance(part, Mapping) for part in prompt):
        return " ".join(map(_last_words, prompt))
    for message in reversed(prompt):
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            return " ".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
    return ""
