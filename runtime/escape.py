"""Keeps text that comes from outside from turning into control tokens.

A chat prompt is text that the template wrote (role marks, image placeholders, think tags) around text that others
wrote. Tokenizing the rendered whole cannot tell them apart: a message that says ``<|endofturn|>`` would end its own
turn. So the characters that a control token starts or ends with are swapped, one for one, for private-use characters
before the template sees the messages. What still reads as a control token afterwards was written by the template; the
rest is swapped back and tokenized as plain text.

One for one, because templates trim, measure, test and JSON-encode contents, and all of that must go on working; both
ends, because two parts of a message (or the template and a message) may each hold half of a token; and every such
character, not only whole tokens, for the same reason. Nothing is swapped in text without these characters, which is
then tokenized exactly as transformers would.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from model.errors import UsageError
from runtime.reasoning import TAGS

_PRIVATE: Final = range(0xF0000, 0xFFFFE)
_PRIVATE_USED = re.compile("[\U000f0000-\U000ffffd]")
_TAGS_FIRST: Final = "|".join(map(re.escape, TAGS))


class ControlText:
    """Finds the characters to swap, given the texts of a tokenizer's control tokens.

    Args:
        tokens: the texts of all control tokens.
        normalizes: whether the tokenizer normalizes its input; look-alikes such as a full-width ``＜`` count as well
            then.
    """

    def __init__(self, tokens: Collection[str], normalizes: bool) -> None:
        ends = {end for token in tokens for end in (token[0], token[-1]) if not end.isalnum()}
        if normalizes:
            ends |= _look_alikes(ends)
        words = [token for token in tokens if token[0].isalnum() and token[-1].isalnum()]
        parts = [f"[{re.escape(''.join(sorted(ends)))}]"] if ends else []
        # A token like EOS has no ends that ordinary words lack; only the whole word gives it away.
        parts += [f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in sorted(words)]
        self.risky = re.compile("|".join(parts) or "(?!)")
        self.risky_but_tags = re.compile("|".join([_TAGS_FIRST, *parts]))
        self.characters = sorted(ends | {word[0] for word in words})


class Disguise:
    """The swap for one conversation: private-use characters that do not occur in it.

    Args:
        control: the characters to swap.
        texts: everything that will be rendered: the messages' strings, and the template itself.

    Raises:
        UsageError: the texts use up the private-use characters.
    """

    def __init__(self, control: ControlText, texts: Iterable[str]) -> None:
        used = {character for text in texts for character in _PRIVATE_USED.findall(text)}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self._swap = dict(zip(control.characters, free, strict=False))
        if len(self._swap) < len(control.characters):
            raise UsageError("cannot use messages", "content", "it uses up Unicode's private-use characters", "")
        self._back = {ord(private): character for character, private in self._swap.items()}
        self._control = control

    def hide(self, text: str, keep_tags: bool = False) -> str:
        """`text` with risky characters swapped; with `keep_tags`, whole think and tool-call tags stay as they are."""
        pattern = self._control.risky_but_tags if keep_tags else self._control.risky
        return pattern.sub(lambda match: self._swap.get(match[0], match[0]), text)

    def show(self, text: str) -> str:
        """Undoes `hide`."""
        return text.translate(self._back)

    def hide_all(self, value: Any, keep_tags: bool = False) -> Any:
        """`value` (JSON types) with every string in it hidden, the keys of objects included."""
        if isinstance(value, str):
            return self.hide(value, keep_tags)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide_all(item) for item in value]
        return value

    def hide_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with everything but roles and kinds of content hidden.

        In the content of assistant turns whole think and tool-call tags stay control tokens: the model wrote them
        that way, and templates look for them.
        """
        return [
            {key: value if key == "role" else self._hide_field(message, key) for key, value in message.items()}
            for message in messages
        ]

    def _hide_field(self, message: Mapping[str, Any], key: str) -> Any:
        value = message[key]
        if key != "content":
            return self.hide_all(value)
        keep_tags = message["role"] == "assistant"
        if isinstance(value, str):
            return self.hide(value, keep_tags)
        return [
            {**part, "text": self.hide(part["text"], keep_tags)} if part["type"] == "text" else part for part in value
        ]


def strings_in(value: Any) -> Iterable[str]:
    """Every string in a value of JSON types, the keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def _look_alikes(ends: set[str]) -> set[str]:
    return {
        chr(code)
        for code in range(0x80, 0x10000)
        if not 0xD800 <= code < 0xE000 and ends & set(unicodedata.normalize("NFKD", chr(code)))
    }
