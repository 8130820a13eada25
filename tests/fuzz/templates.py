"""Chat templates: programs that come with a model."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Final

from runtime.template import TemplateRenderer, load_chat_template
from tests.fuzz.mutators import spoiled
from tests.fuzz.target import Target

# Ways out of the sandbox, and ways to take for ever; some are given to the template whole, some in its middle.
_PIECES: Final = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ self._TemplateReference__context }}", "{{ messages.append(1) }}", "{{ messages.__class__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.environ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception('no') }}", "{{ raise_exception(messages) }}", "{{ strftime_now('%Y' * 100000) }}",
    "{{ 'x' * 10 ** 9 }}", "{{ 10 ** 10 ** 8 }}", "{{ [[]] * 100000000 }}", "{{ range(10 ** 12) | list }}",
    "{{ dict(messages) }}", "{{ messages | map(attribute='__class__') | list }}", "{{ '%s' | format(messages) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ('{0.__class__.__init__.__globals__}' | string).format(messages) }}",
    "{{ joiner.__init__.__globals__ }}", "{{ lipsum }}", "{{ messages | tojson(indent=10 ** 8) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages[10 ** 30] }}", "{{ 1 / 0 }}",
    "{{ undefined.x }}", "{% set x = x ~ x %}",
    "{{ '9' * 5000 | int }}", "{{ ('9' * 5000) | int }}", "{% for a in messages %}{% break %}{% endfor %}",
    "{% generation %}",
    "{{ tojson }}", "{{ messages | attr('__class__') }}", "{{ ''.join(['a'] * 1000) | wordwrap(1) }}",
    "{% raw %}", "{#",
    "{{ messages | sort }}", "{{ messages | groupby('role') }}", "{{ 'a' | center(10 ** 9) }}",
    "{% block x %}{% endblock %}",
    "{{ loop }}", "{{ caller() }}", "{{ '\\ud800' }}", "{{ (1, 2) | random }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
)  # fmt: skip
# These take all the time there is, so they are rare.
_ENDLESS: Final = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(99999) | map('string') | join | replace('1', 'xxxxxxxxxxxxxxxxx') | replace('x', 'yyyyyyyyyyyyyyyyy') }}",
)
_WORDS: Final = (
    b"{{", b"}}", b"{%", b"%}", b"{%-", b"-%}", b" if ", b" else ", b"endfor", b"endif", b"message", b"|", b"(",
    b")", b"[",
    b".role", b" is defined", b" is not ", b" in ", b"set ", b"|tojson", b"|trim", b"loop.index0",
    b"namespace()", b"~", b"**",
)  # fmt: skip
_SECRETS: Final = ("canary-3141592653", "<module ", "<class 'o", "root:x:0")
_MESSAGES: Final = (
    {"role": "user", "content": "가"},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
)


class Template(Target):
    """A template, rendered by the child process as a bundle's own."""

    name, codes = "template", frozenset({2, 4})
    short, long = 100, 25_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._raw = (corpus / "text" / "chat_template.jinja").read_bytes()
        self._folder = scratch / "template"
        self._folder.mkdir(exist_ok=True)
        self._renderer = TemplateRenderer("", {"bos_token": "<|bos|>"})
        self.run(self._raw)

    def mutant(self, random: Random) -> bytes:
        chance = random.random()
        if chance < 0.0005:
            return random.choice(_ENDLESS).encode()
        at = random.randrange(len(self._raw))
        if chance < 0.3:
            piece = "".join(random.choice(_PIECES) for _ in range(random.choice((1, 1, 2)))).encode()
            if random.random() < 0.5:
                return piece
            end = self._raw.find(b"}", at)
            return self._raw[: end + 1] + piece + self._raw[end + 1 :]
        if chance < 0.6:
            return self._raw[:at] + random.choice(_WORDS) + self._raw[at + random.randrange(6) :]
        return spoiled(self._raw, random)

    def run(self, data: bytes) -> str:
        (self._folder / "chat_template.jinja").write_bytes(data)
        self._renderer.source, self._renderer.where = load_chat_template(self._folder)
        return self._renderer.render(_MESSAGES, [{"name": "f"}], enable_thinking=True)

    def judge(self, data: bytes, accepted: str) -> str:
        """Nothing of the process may show, and rendering once more gives the same."""
        told = [secret for secret in _SECRETS if secret in accepted and secret.encode() not in data]
        if told:
            return f"it tells {told}: {accepted[:200]!r}"
        if len(accepted) % 16 == 0 and b"random" not in data and b"now" not in data and " at 0x" not in accepted:
            again: Any = self.run(data)
            return "" if again == accepted else "another text the second time"
        return ""

    def close(self) -> None:
        self._renderer.close()
