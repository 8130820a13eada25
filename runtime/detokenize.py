"""Token ids to text, one at a time.

A byte-level token may end in the middle of a character, so a Hangul syllable or an emoji can take several tokens.
Text is given out only once its bytes are complete, and every token costs the same, however long the text already is.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def hidden_ids(self) -> Collection[int]:
        """Ids that are left out when special tokens are skipped."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""


class Detokenizer:
    """Joins tokens into text; never gives out U+FFFD for a character that is merely incomplete.

    Args:
        tokenizer: maps ids to bytes.
        skip_special_tokens: leave out ``tokenizer.hidden_ids``.
    """

    def __init__(self, tokenizer: TokenBytes, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(tokenizer.hidden_ids) if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often, not always, its own."""
        if token_id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character, else nothing. Starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class StopStrings:
    """Ends a stream of text at the first stop string and holds back what may become one.

    The stop string that is complete first wins; of those complete at the same character, the longest. So the result
    does not depend on how the text is cut into pieces.

    Args:
        strings: non-empty stop strings; none means that nothing is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        # Longest first: the first to match at a character is then the one that starts first.
        self._patterns = [_Pattern(string) for string in sorted(set(strings), key=len, reverse=True)]
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that is certainly before any stop string; once `stopped` is set, always empty."""
        if self.stopped:
            return ""
        start = len(self._held)
        joined = self._held + text
        for index, character in enumerate(text):
            for pattern in self._patterns:
                if pattern.advance(character) and not self.stopped:
                    self.stopped = True
                    end = start + index + 1 - len(pattern.string)
            if self.stopped:
                self._held = ""
                return joined[:end]
        keep = len(joined) - max((pattern.matched for pattern in self._patterns), default=0)
        self._held = joined[keep:]
        return joined[:keep]

    def finish(self) -> str:
        """The text held back, which turned out to be no stop string."""
        rest, self._held = self._held, ""
        return rest


class _Pattern:
    """Knuth, Morris and Pratt's matcher: amortised constant time per character, no look back at the text."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback = [0] * len(string)
        length = 0
        for index in range(1, len(string)):
            while length and string[index] != string[length]:
                length = self._fallback[length - 1]
            length += string[index] == string[length]
            self._fallback[index] = length

    def advance(self, character: str) -> bool:
        """Whether this character completes the string; `matched` is how much of it the text now ends with."""
        while self.matched and character != self.string[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self.string[self.matched]
        return self.matched == len(self.string)
