from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import BundleError, UsageError
from runtime.template import TemplateRenderer, load_chat_template
from tests.unit.chat_templates import STYLE_40, STYLE_45

USER = [{"role": "user", "content": "Hello"}]
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory limits need /proc")


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    with TemplateRenderer(STYLE_45) as opened:
        yield opened


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    with TemplateRenderer(source, {"eos_token": "<eos>"}) as renderer:
        return renderer.render(messages or USER, **options)


def child_of(renderer: TemplateRenderer) -> Any:
    return renderer._process


def test_thinking_defaults_of_the_two_styles(renderer: TemplateRenderer) -> None:
    opened, closed = "<think>\n", "<think>\n\n</think>\n\n"
    user45, user40 = "<|user|>\nHello<|endofturn|>\n<|assistant|>\n", "[|user|]\nHello[|endofturn|]\n[|assistant|]\n"
    assert renderer.render(USER) == user45 + opened
    assert renderer.render(USER, enable_thinking=False) == user45 + closed
    assert renderer.render(USER, enable_thinking=True) == user45 + opened
    with TemplateRenderer(STYLE_40) as other:
        assert other.render(USER) == user40 + closed
        assert other.render(USER, enable_thinking=True) == user40 + opened
        assert other.render(USER, add_generation_prompt=False) == "[|user|]\nHello[|endofturn|]\n"


def test_rendering_equals_transformers(renderer: TemplateRenderer) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    tools = [
        {"type": "function", "function": {"name": "f", "description": "날씨 <&> 'q'", "parameters": {"b": 1, "a": 2}}}
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"도시": "서울", "n": 1.5}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": " Be terse.\n"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "이 이미지를 설명해 줘."}]},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "content": '{"temp": 3}'},
        {"role": "assistant", "content": "<think>old</think>b"},
        {"role": "user", "content": "c\n"},
    ]
    for source in (STYLE_40, STYLE_45):
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"enable_thinking": False}):
            with TemplateRenderer(source, {"eos_token": "<eos>"}) as other:
                expected, _ = utilities.render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=source,
                    eos_token="<eos>",
                    **({"add_generation_prompt": True} | options),
                )
                assert other.render(messages, tools, **options) == expected[0]


def test_what_templates_may_use() -> None:
    assert (
        render("{{ eos_token }}{{ bos_token }}{{ tools is none }}{{ enable_thinking is defined }}") == "<eos>TrueFalse"
    )
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'b': '<가>', 'a': [1]} | tojson }}") == '{"b": "<가>", "a": [1]}'
    assert render("{{ {'a': 1} | tojson(indent=1) }}") == '{\n "a": 1\n}'
    assert render("{% generation %}x{% endgeneration %}y") == "xy"
    assert render("{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}") == "41"


def test_a_template_that_refuses_is_the_users_fault() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


# Ways out of a sandbox, writes to its input, and files.
HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.sys.exit() }}",
    "{{ dict.__init__.__globals__.x }}",
    "{{ '{0.__class__.__base__}'.format(messages) | attr('x') }}{{ (messages | attr('__class__')).x }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'a': 1}) %}",
    "{% set x = messages[0] %}{% do x.clear() %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'base' %}",
    "{% from 'x' import y %}",
    "{% if %}",
    "{{ messages[0].content.nothing.at.all }}",
    "{{ 1 / 0 }}",
    "{{ range(10**9) | list }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_are_refused(source: str) -> None:
    with pytest.raises(BundleError, match=r"chat_template\.jinja") as caught:
        render(source)
    assert len(str(caught.value)) < 600
    assert " at 0x" not in str(caught.value)


@needs_proc
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * 40000000 }}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ '%099999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
    ],
)
def test_templates_that_eat_memory_are_stopped(source: str) -> None:
    with pytest.raises(BundleError, match=r"MiB|OverflowError|MemoryError|ValueError|more than 2 s"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 8) }}",
        "{% macro m(n) %}{% for i in range(9) %}{{ m(n) if n else m(n + 1) }}{% endfor %}{% endmacro %}{{ m(0) }}",
    ],
)
def test_templates_without_end_are_killed(source: str) -> None:
    with TemplateRenderer(source, time_limit_s=0.5) as renderer:
        start = time.perf_counter()
        with pytest.raises(BundleError, match=r"chat_template\.jinja"):
            renderer.render(USER)
        assert time.perf_counter() - start < 60  # of hours; the rest is for a busy machine


def test_the_child_is_kept_and_replaced_when_killed(renderer: TemplateRenderer) -> None:
    first = renderer.render(USER)
    child = child_of(renderer)
    assert renderer.render(USER) == first
    assert child_of(renderer) is child
    os.kill(child.pid, signal.SIGKILL)
    assert renderer.render(USER) == first
    assert child_of(renderer) is not child
    renderer.close()
    assert renderer.render(USER) == first


def test_a_warm_render_takes_milliseconds(renderer: TemplateRenderer) -> None:
    renderer.render(USER)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        renderer.render(USER)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05  # about 0.0005; a new child takes 0.1 and more


def test_no_child_is_left_behind() -> None:
    renderer = TemplateRenderer(STYLE_45)
    renderer.render(USER)
    closed = child_of(renderer)
    renderer.close()
    assert closed.returncode == 0
    renderer.render(USER)
    collected = child_of(renderer)
    del renderer
    gc.collect()
    assert collected.returncode is not None


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_child_ignores_control_c(renderer: TemplateRenderer) -> None:
    renderer.render(USER)
    os.kill(child_of(renderer).pid, signal.SIGINT)
    time.sleep(0.05)
    assert child_of(renderer).poll() is None
    # While it starts it could not ignore it yet: the terminal sends it to the parent's group alone.
    assert os.getpgid(child_of(renderer).pid) != os.getpgid(0)


def test_an_interrupted_render_leaves_no_answer_to_the_next(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook comes while the child still writes; its text must not become another conversation's."""
    expected = renderer.render(USER)

    def interrupted(stream: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.template.read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render([{"role": "user", "content": "of the interrupted conversation"}])
    assert renderer.render(USER) == expected


def test_many_threads_share_one_child(renderer: TemplateRenderer) -> None:
    texts: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(5):
            texts[number] = renderer.render([{"role": "user", "content": f"number {number}"}])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"\nnumber {number}<" in text for number, text in texts.items())
    assert len(texts) == 8


def test_ten_thousand_turns(renderer: TemplateRenderer) -> None:
    turns = [{"role": role, "content": f"turn {i}"} for i in range(5_000) for role in ("user", "assistant")]
    text = renderer.render([*turns, *USER])
    assert text.count("<|endofturn|>") == 10_001


def test_a_conversation_too_large_for_any_context(renderer: TemplateRenderer) -> None:
    with pytest.raises(UsageError, match="at most"):
        renderer.render([{"role": "user", "content": "x" * 2**25}])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no chat template"):
        load_chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "from config"}')
    assert load_chat_template(tmp_path) == ("from config", "tokenizer_config.json")
    config.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}'
    )
    assert load_chat_template(tmp_path) == ("d", "tokenizer_config.json")
    config.write_text('{"chat_template": 7}')
    with pytest.raises(BundleError):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("own file {{ eos_token }}")
    with TemplateRenderer.load(tmp_path, {"eos_token": "!"}) as renderer:
        assert renderer.render(USER) == "own file !"
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(BundleError, match="longer"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BundleError, match="UTF-8"):
        load_chat_template(tmp_path)
