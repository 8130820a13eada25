"""Drafted answers against plain decoding: the same tokens, whatever is drafted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from exaone_export.cli import main
from model.errors import UsageError
from runtime import decode, speculation
from runtime.decode import Ids
from runtime.engine import Engine
from runtime.options import GenerationOptions
from runtime.sampling import likeliest, make_sampler
from runtime.speculation import Drafts
from tests.e2e.conftest import Bundles

MODES = ("mtp", "lookup", "auto")


def words(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(100, 500, length).tolist()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 84, 3), np.uint8))


@pytest.fixture(scope="module")
def seeing(bundles: Bundles) -> Engine:
    return Engine.load(bundles.bundle("vlm"))


class Mistaken(Drafts):
    """Knows the answer, and drafts it with mistakes."""

    def __init__(self, answer: list[int], prompt: int, mistakes: float, most: int) -> None:
        super().__init__()
        self.answer, self.prompt, self.mistakes, self.largest = answer, prompt, mistakes, most
        self.rng = np.random.default_rng(1)

    def propose(self, text: Ids, room: int) -> list[int]:
        self._source = "known"
        start = len(text) - self.prompt
        right = np.array(self.answer[start : start + max(0, min(room, self.largest))], np.int64)
        wrong = self.rng.random(len(right)) < self.mistakes
        drafts: list[int] = np.where(wrong, 100 + (right + 1) % 300, right).tolist()
        return drafts


@pytest.mark.parametrize("kind", ["window", "full"])
def test_far_beyond_the_window_with_many_wrong_drafts(bundles: Bundles, tmp_path: Path, kind: str) -> None:
    """1,000 tokens over a window of 8 in a buffer of 72: every eviction comes at another place of a pass."""
    folder = bundles.bundle("hybrid") if kind == "window" else tmp_path / "bundle"
    if kind == "full":
        ee.export(bundles.source("hybrid"), folder, kv_cache=kind)
    prompt, count = words(30), 1000
    # Drawn, as greedy answers of a random model soon go round in circles.
    options = GenerationOptions(do_sample=True, temperature=1.0, seed=4)
    with Engine.load(folder) as engine:
        steps = decode.generate(engine.graphs.forward(1), [prompt], [make_sampler(options)], [count], ())
        plain = [step[0].id for step in steps]
        assert len(set(plain)) > 100
        for mistakes, most in ((0.5, 3), (0.15, 9)):
            drafts = Mistaken(plain, len(prompt), mistakes, most)
            forward = engine.graphs.forward(1)
            found = [
                step[0].id for step in speculation.generate(forward, prompt, make_sampler(options), count, (), drafts)
            ]
            assert found == plain
            account = drafts.account()
            assert account.drafted - account.accepted > 100
            assert account.passes < 0.75 * count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"do_sample": False, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 2},
    ],
)
def test_answers_about_images_are_those_of_plain_decoding(seeing: Engine, mode: str, settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"images": [picture(1), picture(2)], "max_new_tokens": 150, **settings}
    plain = seeing.generate("What is this?", **given)
    drafted = seeing.generate("What is this?", **given, speculate=mode)
    assert drafted.token_ids == plain.token_ids
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
    for one, other in zip(drafted.logprobs or [], plain.logprobs or [], strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    account = drafted.timings.speculation
    assert plain.timings.speculation is None
    assert account is not None
    assert account.passes == len(plain.token_ids) - 1 - account.accepted or plain.finish_reason == "stop"
    assert mode == "auto" or set(account.by_source) <= {mode}


def test_loops_are_drafted(bundles: Bundles) -> None:
    """Greedy answers of a random model soon go round in circles."""
    with Engine.load(bundles.bundle("dense")) as engine:
        prompt, count = words(40), 400
        plain = decode.generate(engine.graphs.forward(1), [prompt], [likeliest], [count], ())
        drafts = Drafts()
        drafted = speculation.generate(engine.graphs.forward(1), prompt, likeliest, count, (), drafts)
        assert [step[0].id for step in drafted] == [step[0].id for step in plain]
        assert drafts.account().accepted > 100


def test_the_draft_head_is_the_checkpoints(bundles: Bundles, seeing: Engine) -> None:
    """First drafts are what the eager draft head says after the same tokens."""
    import torch

    from model.load import load_exaone

    ids = words(50, 3)
    forward, head = seeing.graphs.forward(1), seeing.graphs.draft_head()
    assert head is not None
    assert forward.watch(head.watch)
    forward(np.array([ids[:20]]), np.array([20], np.int64))
    forward(np.array([[*ids[20:30], 7, 8]]), np.array([32], np.int64))
    head.keep(10)
    forward.rewind(30)
    model = load_exaone(bundles.source("vlm"))
    assert model.mtp is not None
    assert model.embedding is not None
    for end in range(30, 50):
        drafts = head.propose(ids[end], 3, lambda drafted: 0.0, lambda seconds: None)
        with torch.no_grad():
            x = model.embedding(torch.tensor([ids[: end + 1]]), torch.zeros(0, 64))
            past = model.decoder.empty_cache(1)
            ones = torch.ones(1, end, dtype=torch.int64)
            keep = torch.tensor([1])
            hidden = model.decoder(x[:, :end], ones, past, keep)[1]
            logits = model.mtp(x[:, 1:], hidden, ones, past[: len(model.mtp.layers)], keep)[0]
        assert drafts[0] == int(logits[0, -1].argmax())
        assert len(drafts) == 3
        forward(np.array([[ids[end], *drafts[:2]]]), np.array([end + 3], np.int64), keep=3)
        head.keep(1)
        forward.rewind(end + 1)


def test_ends_inside_drafts(seeing: Engine) -> None:
    given: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
    plain = seeing.generate("Say it.", **given)
    place = len(plain.text) * 2 // 3
    stop = plain.text[place : place + 2]
    for mode in MODES:
        results = [seeing.generate("Say it.", **given, stop=[stop], speculate=each) for each in ("off", mode)]
        assert results[0].text == results[1].text
        assert results[0].token_ids == results[1].token_ids
        streamed = list(seeing.stream("Say it.", **given, speculate=mode))
        assert "".join(chunk.text for chunk in streamed if chunk.kind == "text") == plain.text
        assert [token for chunk in streamed for token in chunk.token_ids] == plain.token_ids


def test_constrained_answers(seeing: Engine) -> None:
    pytest.importorskip("llguidance")
    given: dict[str, Any] = {
        "max_new_tokens": 80,
        "do_sample": False,
        "enable_thinking": False,
        "regex": "[a-c]{20,30}(xyz)+[0-9]{9}",
    }
    plain = seeing.generate("Say it.", **given)
    for mode in MODES:
        drafted = seeing.generate("Say it.", **given, speculate=mode)
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)


def test_conversations_go_on_after_drafts(seeing: Engine) -> None:
    """What was drafted in vain is not in the cache; the next turn reads what is new."""
    answers = {}
    for mode in ("off", "mtp", "lookup"):
        session = seeing.session()
        settings: dict[str, Any] = {"max_new_tokens": 70, "do_sample": False, "speculate": mode}
        answers[mode] = [session.send(text, **settings).token_ids for text in ("One?", "Two?", "Three?")]
    assert answers["mtp"] == answers["off"] == answers["lookup"]


def test_a_bundle_without_draft_head(bundles: Bundles) -> None:
    with Engine.load(bundles.bundle("dense")) as engine:
        plain = engine.generate("Say it.", max_new_tokens=20, do_sample=False)
        assert engine.generate("Say it.", max_new_tokens=20, do_sample=False, speculate="auto").text == plain.text
        with pytest.raises(UsageError, match="no draft head"):
            engine.generate("Say it.", speculate="mtp")
        both = engine.generate(["Say it.", "And this."], max_new_tokens=9, do_sample=False, speculate="lookup")
        assert [result.timings.speculation for result in both] == [None, None]


def test_flags(bundles: Bundles, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(bundles.bundle("vlm")), "Say it.", "--greedy", "--max-new-tokens", "40", "--json"]
    assert main([*arguments, "--speculate", "mtp", "--draft-tokens", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    account = found["timings"]["speculation"]
    assert 0 < account["drafted"] <= 2 * account["passes"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == found["token_ids"]
