"""From a conversation to token ids: render the template, tokenize, make room for images and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from model.errors import BundleError, UsageError
from runtime.escape import Disguise, strings_in
from runtime.messages import build_messages, check_messages, check_tools, count_media, user_texts
from runtime.reasoning import opens_think
from runtime.tokenizer import Tokenizer

__all__ = [
    "MediaTokens",
    "Prompt",
    "Renderer",
    "build_messages",
    "check_length",
    "check_messages",
    "check_tools",
    "expand_placeholders",
    "far_too_long",
    "render_prompt",
]

LONGEST_ANSWER: Final = 32768  # tokens; the model card's advice for EXAONE 4.5


class Renderer(Protocol):
    """What a prompt needs of a chat template; `runtime.template.TemplateRenderer` has it."""

    source: str
    where: str

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation."""


@dataclass(frozen=True)
class MediaTokens:
    """How many tokens each image and each video takes, in the order of the conversation, and their placeholder ids."""

    image_token_id: int | None = None
    image_counts: tuple[int, ...] = ()
    video_token_id: int | None = None
    video_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A conversation ready for the model.

    Attributes:
        text: what the template wrote, one placeholder for each image and each video.
        token_ids: its ids, placeholders expanded.
        image_tokens: how many of the ids stand for pieces of images and videos.
        thinking: whether the text ends inside an open think block.
    """

    text: str
    token_ids: tuple[int, ...]
    image_tokens: int
    thinking: bool


NO_MEDIA: Final = MediaTokens()


def render_prompt(
    renderer: Renderer,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    media: MediaTokens = NO_MEDIA,
    context: int | None = None,
) -> Prompt:
    """Renders and tokenizes a conversation.

    Control tokens come from the template alone, never from the messages (see `runtime.escape`).

    Args:
        renderer: the bundle's chat template.
        tokenizer: the bundle's tokenizer.
        messages: see `runtime.messages`; checked here.
        tools: JSON descriptions of functions the model may call.
        enable_thinking: for the template; None = its own default.
        media: token counts of the images and videos given along with the messages.
        context: the longest sequence the model can take, of a prompt that must fit; one that is far too long is refused
            before all of it is tokenized. None tokenizes whatever it is.

    Raises:
        UsageError: the messages have a fault, do not match the images and videos, or are far too long.
        BundleError: the template fails, or leaves out what a user said.
    """
    clean, functions = check_messages(messages), check_tools(tools)
    for kind, counts in (("image", media.image_counts), ("video", media.video_counts)):
        _check_count(kind, "the messages have", count_media(clean, kind), len(counts))
    control = tokenizer.control_text
    strings = [*strings_in(clean), *strings_in(functions)]
    if any(map(control.risky.search, strings)):
        disguise = Disguise(control, [*strings, renderer.source])
        hidden = disguise.hide_messages(clean)
        rendered = renderer.render(hidden, disguise.hide_all(functions), enable_thinking)
        _check_nothing_dropped(rendered, hidden, renderer.where)
        text = disguise.show(rendered)
        _check_not_far_too_long(tokenizer, text, context)
        ids = tokenizer.encode_disguised(rendered, disguise)
    else:
        text = renderer.render(clean, functions, enable_thinking)
        _check_nothing_dropped(text, clean, renderer.where)
        _check_not_far_too_long(tokenizer, text, context)
        ids = tokenizer.encode(text)
    expanded = expand_placeholders(
        ids, media.image_token_id, media.image_counts, media.video_token_id, media.video_counts
    )
    seen = sum(media.image_counts) + sum(media.video_counts)
    return Prompt(text, tuple(expanded), seen, opens_think(text))


def expand_placeholders(
    ids: Sequence[int],
    image_token_id: int | None,
    image_counts: Sequence[int],
    video_token_id: int | None = None,
    video_counts: Sequence[int] = (),
) -> list[int]:
    """`ids` with every image or video placeholder repeated as often as its image or video has tokens.

    Raises:
        UsageError: there are more or fewer placeholders than images or videos.
    """
    remaining = {}
    for kind, token_id, counts in (("image", image_token_id, image_counts), ("video", video_token_id, video_counts)):
        found = sum(1 for i in ids if i == token_id)
        _check_count(kind, "the prompt has", found, len(counts))
        if token_id is not None:
            remaining[token_id] = iter(counts)
    expanded: list[int] = []
    for token_id in ids:
        expanded += [token_id] * next(remaining[token_id]) if token_id in remaining else [token_id]
    return expanded


def far_too_long(tokenizer: Tokenizer, text: str, most: int) -> bool:
    """Whether `text` has more than `most` tokens for certain, told by its beginning: all of it may take many seconds.

    What follows a beginning decides how the beginning's last word is split, which is a few tokens, and nothing of what
    stands before; a quarter more than `most`, and a thousand, is far beyond that. False says nothing. Of a text that
    fits, at most half is looked at.
    """
    wanted = most + most // 4 + 1000
    size = 2 * wanted
    while 2 * size < len(text):
        found = len(tokenizer.encode(text[:size]))
        if found > wanted:
            return True
        # If what follows has as many characters a token, and a little more.
        size = max(2 * size, 11 * size * wanted // (10 * max(1, found)))
    return False


def check_length(prompt_tokens: int, max_new_tokens: int | None, context: int) -> int:
    """How many tokens to generate at most; nothing is ever cut silently.

    Args:
        prompt_tokens: length of the prompt, images included.
        max_new_tokens: what was asked for; None = what the context has room for, up to `LONGEST_ANSWER`.
        context: the longest sequence the model can take.

    Raises:
        UsageError: prompt and answer do not fit.
    """
    room = context - prompt_tokens
    if room <= 0:
        why = f"it has {prompt_tokens} tokens and the context holds {context}, answer included"
        raise UsageError("prompt too long", "prompt", why, "Shorten it or use smaller images")
    if max_new_tokens is None:
        return min(room, LONGEST_ANSWER)
    if max_new_tokens > room:
        why = (
            f"the prompt has {prompt_tokens} tokens and {max_new_tokens} more are asked for, "
            f"{prompt_tokens + max_new_tokens} together, but the context holds {context}"
        )
        raise UsageError("answer too long", "max_new_tokens", why, f"Ask for at most {room}")
    return max_new_tokens


def _check_not_far_too_long(tokenizer: Tokenizer, text: str, context: int | None) -> None:
    if context is not None and far_too_long(tokenizer, text, context):
        certain = context + context // 4
        why = f"it has more than {certain} tokens and the context holds {context}, answer included"
        raise UsageError("prompt too long", "prompt", why, "Shorten it or use smaller images")


def _check_count(kind: str, who: str, places: int, given: int) -> None:
    if places != given:
        what = f"{places} {kind} placeholder{'' if places == 1 else 's'}"
        why = f"{who} {what}, but {given} {kind}{'' if given == 1 else 's'} {'is' if given == 1 else 'are'} given"
        raise UsageError("cannot use messages", f"{kind}s", why, f"Give one {kind} for each placeholder")


def _check_nothing_dropped(rendered: str, messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuses a template that leaves out a user's words; layout may change, so white space does not count."""
    squeezed = "".join(rendered.split())
    position = 0
    for text in user_texts(messages):
        wanted = "".join(text.split())
        found = squeezed.find(wanted, position)
        if found < 0:  # a template may reorder, or write JSON
            found = max(squeezed.find(wanted), squeezed.find("".join(_as_json(text.strip()).split())))
        if found < 0:
            why = f"it leaves out what the user said ({len(text)} characters)"
            raise BundleError("cannot render chat template", where, why, "Use the template that came with the model")
        position = found + len(wanted)


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
