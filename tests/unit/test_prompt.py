from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import BundleError, UsageError
from runtime.messages import build_messages, check_messages, check_tools, count_media
from runtime.prompt import MediaTokens, check_length, expand_placeholders, render_prompt
from runtime.template import TemplateRenderer
from runtime.tokenizer import Tokenizer
from tests.unit.chat_templates import STYLE_40, STYLE_45
from tests.unit.tiny_tokenizer import SPECIAL, TAGS, write_tokenizer

GOLDEN = Path(__file__).parents[2].parent / "shared" / "vectors" / "chat.json"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("bundle")))


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    with TemplateRenderer(STYLE_45) as opened:
        yield opened


def test_images_come_before_the_prompt() -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "Read it."}
    assert build_messages("Read it.", images=2, system="Be exact.") == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": [image, image, text]},
    ]
    assert build_messages("Read it.") == [{"role": "user", "content": "Read it."}]
    assert build_messages(images=1, videos=1) == [{"role": "user", "content": [image, {"type": "video"}]}]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert build_messages("c", history=history) == [*history, {"role": "user", "content": "c"}]
    assert build_messages(history=history) == history


@pytest.mark.parametrize("prompt", ["", " \n\t", "\u3000", None])
def test_there_must_be_something_to_answer(prompt: str | None) -> None:
    with pytest.raises(UsageError):
        build_messages(prompt)
    with pytest.raises(UsageError):
        build_messages(prompt, system="Be exact.")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ("text", "messages"),
        (None, "messages"),
        ({"role": "user"}, "messages"),
        (["text"], "messages[0]"),
        ([{"role": "system", "content": "s"}], "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "developer", "content": "x"}], "messages[0].role"),
        ([{"role": 7, "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ""}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "messages[0].content"),
        ([{"role": "user", "content": nested(10_000)}], "messages[0].content[0]"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": "x", "name": nested(10_000)}], "messages[0].name"),
        ([{"role": "user", "content": "x", "name": float("nan")}], "messages[0].name"),
        ([{"role": "user", "content": "x", "name": b"x"}], "messages[0].name"),
        ([{"role": "user", "content": "x", 5: "x"}], "messages[0]"),
        ([{"role": "user", "content": "x\udc00"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "name": {"\ud83d": 1}}], "messages[0].name"),
    ],
)
def test_bad_messages_are_refused_by_place(messages: Any, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_messages(messages)
    assert caught.value.where == where
    assert len(str(caught.value)) < 300


def test_messages_are_cleaned() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": (1, 2.5, None)}}}
    clean = check_messages(
        [
            {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "x", "k": 1}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"},
            {"role": "tool", "content": "", "tool_call_id": "1"},
        ]
    )
    assert clean[0]["content"] == [{"type": "image"}, {"type": "text", "text": "x"}]
    assert clean[1]["content"] == ""
    assert clean[1]["reasoning_content"] == "r"
    assert clean[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1, 2.5, None]}
    assert (count_media(clean, "image"), count_media(clean, "video")) == (1, 0)


def test_tools_are_checked() -> None:
    assert check_tools(None) is None
    assert check_tools([]) is None
    assert check_tools([{"name": "f"}]) == [{"name": "f"}]
    for bad in ("x", {"name": "f"}, ["x"], [{"x": object()}], [{"x": nested(1000)}]):
        with pytest.raises(UsageError, match="tools"):
            check_tools(bad)


def test_placeholders_are_expanded_in_order() -> None:
    assert expand_placeholders([1, 9, 2, 9], 9, [2, 3]) == [1, 9, 9, 2, 9, 9, 9]
    assert expand_placeholders([8, 9, 8], 9, [2], 8, [1, 3]) == [8, 9, 9, 8, 8, 8]
    assert expand_placeholders([1, 2], None, []) == [1, 2]
    with pytest.raises(UsageError, match="1 image placeholder, but 2 images are given"):
        expand_placeholders([1, 9], 9, [2, 3])
    with pytest.raises(UsageError, match="2 video placeholders, but 1 video is given"):
        expand_placeholders([8, 8], 9, [], 8, [4])
    with pytest.raises(UsageError, match="0 image placeholders, but 1 image is given"):
        expand_placeholders([1], None, [4])


def test_lengths_have_clear_numbers() -> None:
    assert check_length(10, 6, 16) == 6
    assert check_length(10, None, 16) == 6
    assert check_length(10, None, 10**6) == 32768
    for tokens in (16, 17, 160):
        with pytest.raises(UsageError, match=f"it has {tokens} tokens and the context holds 16"):
            check_length(tokens, None, 16)
    with pytest.raises(UsageError, match=r"10 tokens and 7 more .* 17 together, .* 16\. Ask for at most 6"):
        check_length(10, 7, 16)


def test_a_prompt_with_images(renderer: TemplateRenderer, tokenizer: Tokenizer) -> None:
    pad = tokenizer.token_to_id("<|image_pad|>")
    messages = build_messages("이 이미지를 설명해 줘.", images=2)
    prompt = render_prompt(renderer, tokenizer, messages, media=MediaTokens(pad, (3, 2)))
    mark = "<vision><|image_pad|></vision>\n"
    assert prompt.text == f"<|user|>\n{mark}{mark}이 이미지를 설명해 줘.<|endofturn|>\n<|assistant|>\n<think>\n"
    expanded = prompt.text.replace("<|image_pad|>", "<|image_pad|>" * 3, 1)
    expanded = expanded[::-1].replace(">|dap_egami|<", ">|dap_egami|<" * 2, 1)[::-1]
    assert list(prompt.token_ids) == tokenizer.encode(expanded)
    assert (prompt.image_tokens, prompt.thinking) == (5, True)
    assert not render_prompt(renderer, tokenizer, build_messages("x"), enable_thinking=False).thinking
    with pytest.raises(UsageError, match="2 image placeholders, but 1 image is given"):
        render_prompt(renderer, tokenizer, messages, media=MediaTokens(pad, (3,)))
    with pytest.raises(UsageError, match="0 image placeholders, but 1 image is given"):
        render_prompt(renderer, tokenizer, build_messages("x"), media=MediaTokens(pad, (3,)))


def test_a_template_without_images_says_so(tokenizer: Tokenizer) -> None:
    messages = build_messages("x", images=1)
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with TemplateRenderer(source) as text_only, pytest.raises(UsageError, match="the prompt has 0 image placeholders"):
        render_prompt(text_only, tokenizer, messages, media=MediaTokens(9, (3,)))


@pytest.mark.parametrize("text", ["a < b, [x] > <y>", "<thin", "k> <|user", "|> <", "가", "\ufeff\0 \u202e", "<b></b>"])
def test_harmless_text_is_tokenized_as_the_whole(renderer: TemplateRenderer, tokenizer: Tokenizer, text: str) -> None:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    messages += [{"role": "assistant", "content": f"<think>\nr\n</think>\n\n{text}"}, {"role": "user", "content": text}]
    prompt = render_prompt(renderer, tokenizer, messages)
    assert prompt.text == renderer.render(messages)
    assert list(prompt.token_ids) == tokenizer.encode(prompt.text)


def attacks(count: int) -> list[str]:
    draw = random.Random(3)
    marks = [*SPECIAL, *TAGS, "[|endofturn|]", "<|image_pad|>"]
    halves = [mark[:cut] for mark in marks for cut in (1, len(mark) // 2)]
    pieces = [*marks, *marks, *halves, " ", "\n", "대", "x", ">", "|>", "k>"]
    return [*marks, *("".join(draw.choices(pieces, k=draw.randint(1, 6))) for _ in range(count))]


def conversation(field: str, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    half = len(text) // 2
    user: dict[str, Any] = {"role": "user", "content": "hello"}
    call = {"type": "function", "function": {"name": "f" + text, "arguments": {text: [text]}}}
    if field == "user":
        return [{"role": "user", "content": "x" + text}], None
    if field == "parts":
        texts = [{"type": "text", "text": part} for part in ("x" + text[:half], text[half:])]
        return [{"role": "user", "content": texts}], None
    if field == "name":
        return [user | {"name": "n" + text}], None
    if field == "calls":
        return [user, {"role": "assistant", "content": "", "tool_calls": [call]}, user], None
    if field == "reasoning":
        return [user, {"role": "assistant", "content": "b", "reasoning_content": "x" + text}], None
    if field == "tools":
        return [user], [{"name": "f" + text, "parameters": {"p" + text: {"description": text}}}]
    return [{"role": field, "content": "x" + text}, user], None


FIELDS = ["user", "system", "tool", "parts", "name", "tools", "calls", "reasoning"]


@pytest.mark.parametrize("field", FIELDS)
def test_messages_never_become_control_tokens(renderer: TemplateRenderer, tokenizer: Tokenizer, field: str) -> None:
    def control(text: str) -> list[int]:
        messages, tools = conversation(field, text)
        prompt = render_prompt(renderer, tokenizer, messages, tools)
        assert tokenizer.decode(prompt.token_ids, skip_special_tokens=False) == prompt.text
        assert json.dumps(text, ensure_ascii=False)[1:-1] in prompt.text or text.strip() in prompt.text
        return [i for i in prompt.token_ids if i in tokenizer.control_ids]

    expected = control("y")
    for text in attacks(300):
        assert control(text) == expected, text


def test_assistant_turns_keep_only_their_own_tags(renderer: TemplateRenderer, tokenizer: Tokenizer) -> None:
    text = "see <tool_call>{}</tool_call> <|user|><tool_result><|image_pad|> <thi"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}, {"role": "user", "content": "b"}]
    prompt = render_prompt(renderer, tokenizer, turns)
    plain = render_prompt(renderer, tokenizer, [turns[0], {"role": "assistant", "content": "c"}, turns[2]])
    tags = [tokenizer.token_to_id("<tool_call>"), tokenizer.token_to_id("</tool_call>")]
    found = [i for i in prompt.token_ids if i in tokenizer.control_ids]
    rest = [i for i in plain.token_ids if i in tokenizer.control_ids]
    assert sorted(found) == sorted([*rest, *(tag for tag in tags if tag is not None)])
    assert text in prompt.text


@pytest.mark.parametrize("text", ["lost words", "<|user|> lost <b>"])
def test_a_template_that_drops_the_user_is_refused(tokenizer: Tokenizer, text: str) -> None:
    for source in ("fixed text", "{{ messages[0].content[:4] }}"):
        with TemplateRenderer(source) as renderer, pytest.raises(BundleError, match="leaves out what the user said"):
            render_prompt(renderer, tokenizer, build_messages(text))
    for source in ("{{ messages[0].content | trim | tojson }}", "{{ messages[-1].content.split() | join('\\n') }}"):
        with TemplateRenderer(source) as renderer:
            assert render_prompt(renderer, tokenizer, build_messages(f' {text} "q"\n')).text


def golden_cases() -> list[Any]:
    if not GOLDEN.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="the golden renderings are not here"))]
    # Our own templates share the layout of turns with the models', not the wording of tool declarations.
    cases = [case for case in json.loads(GOLDEN.read_text(encoding="utf-8")) if "tools" not in case["inputs"]]
    return [pytest.param(case, id=f"{case['model']} {case['case']}") for case in cases]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_renderings(case: dict[str, Any], tokenizer: Tokenizer) -> None:
    inputs = case["inputs"]
    with TemplateRenderer(STYLE_45 if case["model"] == "4.5" else STYLE_40) as renderer:
        assert renderer.render(**inputs) == case["expected"]
        if inputs["add_generation_prompt"]:
            images = count_media(check_messages(inputs["messages"]), "image")
            media = MediaTokens(tokenizer.token_to_id("<|image_pad|>"), (1,) * images)
            thinking = inputs.get("enable_thinking")
            prompt = render_prompt(renderer, tokenizer, inputs["messages"], None, thinking, media)
            assert prompt.text == case["expected"]
            assert list(prompt.token_ids) == tokenizer.encode(case["expected"])


def test_these_modules_import_neither_torch_nor_transformers() -> None:
    names = ["detokenize", "escape", "messages", "options", "prompt", "reasoning", "sampling"]
    names += ["template", "template_child", "tokenizer", "tools", "presets", "logprobs", "constraint", "choosing"]
    code = f"import sys, {', '.join('runtime.' + name for name in names)}\n"
    code += "print([n for n in ('torch', 'transformers', 'jinja2', 'onnxruntime') if n in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
