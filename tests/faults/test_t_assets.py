"""T08 to T11: what comes with a bundle and reads text: hostile chat templates, and tokenizers that are none.

Numbers are those of the table of faults that the toolkit is tried against. A template runs sandboxed in a child process
with a limit on time and memory, also that of a known model, and gives what transformers gives.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_export.cli import main
from exporter.export import export_checkpoint
from model.bundle import MANIFEST, file_sha256
from model.errors import BundleError
from runtime.template import TemplateRenderer
from tests.tiny import TEMPLATE, make_checkpoint
from tests.unit.chat_templates import STYLE_40, STYLE_45

USER = [{"role": "user", "content": "Hello"}]
Copy = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    source = make_checkpoint(folder / "source", "dense", num_hidden_layers=1, layer_types=["full_attention"])
    export_checkpoint(source, folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Copy:
    """A copy of the bundle in which one text file is another, as its manifest says."""

    def make(name: str, text: str) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(bundle, copy)
        (copy / name).write_text(text, encoding="utf-8")
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["files"][name] = {"size": (copy / name).stat().st_size, "sha256": file_sha256(copy / name)}
        (copy / MANIFEST).write_text(json.dumps(manifest))
        return copy

    return make


def ends(capsys: pytest.CaptureFixture[str], code: int, bundle: Path, prompt: str, *flags: str) -> str:
    """The message of a command that ends with `code`, and says no more than that."""
    capsys.readouterr()
    found = main(["generate", str(bundle), prompt, *flags])
    out, err = capsys.readouterr()
    assert (found, out) == (code, ""), err
    assert len(err.splitlines()) <= 3
    assert len(err) < 1000
    assert "Traceback" not in err
    assert " at 0x" not in err
    return err


RUNS = [
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARK') }}",
    "{{ raise_exception.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[-1].__init__.__globals__ }}",
    "{{ self._TemplateReference__context.__class__.__init__.__globals__ }}",
    "{{ (messages | attr('__class__') | attr('__base__')).__subclasses__() }}",
    "{% set _ = messages.append(messages[0]) %}{{ messages[0].content }}",
    "{% set _ = messages[0].update({'content': 'x'}) %}{{ messages[0].content }}",
    "{% include '/etc/passwd' %}{{ messages[0].content }}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
]


@pytest.mark.parametrize("source", RUNS)
def test_t08_templates_that_reach_for_the_machine(source: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with TemplateRenderer(source.replace("MARK", str(mark))) as renderer, pytest.raises(BundleError) as caught:
        renderer.render(USER)
    assert not mark.exists()
    assert "chat_template.jinja" in str(caught.value)


ENDLESS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%0999999999d' % 1 }}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_t08_templates_without_end(source: str) -> None:
    with TemplateRenderer(source, time_limit_s=0.4) as renderer, pytest.raises(BundleError):
        renderer.render(USER)


def test_t08_a_bundle_with_a_hostile_template(copied: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied("chat_template.jinja", RUNS[0].replace("MARK", str(tmp_path / "mark")))
    assert "chat_template.jinja" in ends(capsys, 4, copy, "Hello")
    assert not (tmp_path / "mark").exists()


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Turns of all roles with odd characters, control tokens and white space in them."""
    rng = random.Random(1)
    words = [
        "안녕",
        "Hello",
        " ",
        "\n",
        "<|endofturn|>",
        "<think>",
        "</think>",
        "{{ x }}",
        "{% y %}",
        "'\"",
        "<&>",
        "🚀",
    ]
    made = []
    for _ in range(count):
        turns: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            turns.append({"role": "system", "content": "".join(rng.choices(words, k=3))})
        for _ in range(rng.randint(1, 3)):
            turns.append({"role": "user", "content": "".join(rng.choices(words, k=rng.randint(1, 6))) + "."})
            turns.append({"role": "assistant", "content": "".join(rng.choices(words, k=4))})
            if rng.random() < 0.2:
                turns.append({"role": "tool", "content": json.dumps({"a": rng.random()})})
        made.append([*turns, {"role": "user", "content": "".join(rng.choices(words, k=4)) + "?"}])
    return made


@pytest.mark.parametrize("source", [TEMPLATE, STYLE_40, STYLE_45], ids=["tiny", "4.0", "4.5"])
def test_t09_a_thousand_conversations_as_transformers_writes_them(source: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    made = conversations(340)
    wanted, _ = utilities.render_jinja_template(made, chat_template=source, add_generation_prompt=True)
    with TemplateRenderer(source) as renderer:
        assert [renderer.render(turns) for turns in made] == wanted


DROPS = ["nothing", "{{ messages[0].content[:2] }}", "{{ messages[0].content | upper }}"]


@pytest.mark.parametrize("source", DROPS)
def test_t10_a_template_that_drops_what_the_user_says(
    source: str, copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    err = ends(capsys, 4, copied("chat_template.jinja", source), "Hello", "--dry-run")
    assert "leaves out what the user said (5 characters)" in err


def test_t10_a_template_that_raises(copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied("chat_template.jinja", "{{ raise_exception('roles must\nalternate\x1b[31m') }}")
    err = ends(capsys, 2, copy, "Hello")
    assert "roles must alternate" in err
    assert "\x1b" not in err
    with TemplateRenderer("{{ 1 / 0 }}") as renderer, pytest.raises(BundleError, match="chat_template"):
        renderer.render(USER)


def without_end(raw: dict[str, Any]) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pattern, raw["pre_tokenizer"]]}


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "empty": dict.clear,
    "no model": lambda raw: raw.pop("model"),
    "an unknown model": lambda raw: raw["model"].update(type="Magic"),
    "another model": lambda raw: raw.update(model=WORDS),
    "merges of unknown tokens": lambda raw: raw["model"].update(merges=[["가나", "다라"]]),
    "merges of another kind": lambda raw: raw["model"].update(merges=[1, 2]),
    "a regex without end": without_end,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_t11_tokenizers_that_cannot_be_used(
    name: str, bundle: Path, copied: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = json.loads((bundle / "tokenizer.json").read_text())
    TOKENIZERS[name](raw)
    copy = copied("tokenizer.json", json.dumps(raw))
    assert "tokenizer.json" in ends(capsys, 4, copy, "a" * 200 + "!", "--dry-run")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "\0" * 100, "[" * 5000], ids=ascii)
def test_t11_tokenizers_that_are_no_json(text: str, copied: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokenizer.json" in ends(capsys, 4, copied("tokenizer.json", text), "x", "--dry-run")
