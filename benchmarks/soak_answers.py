"""Answers to the soak's requests: those of fresh engines, which are right, and those of the engine under test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.soak_cases import BAD, Case, Turn
from benchmarks.soak_pictures import Pictures
from model.bundle import MTP
from model.errors import ExaoneError
from runtime.conversation import Session
from runtime.engine import Engine
from runtime.logprobs import TokenLogprob
from runtime.messages import build_messages
from runtime.reasoning import THINK_CLOSE
from runtime.rows import RowPasses
from runtime.transcript import Chunk, Result

TIE: Final = 0.125  # of a logit
CUT: Final = 3  # tokens after which a request is cancelled
_TELLING: Final = 12  # tokens at the end of a prompt that no other has: the template's are fewer
Given = tuple[list[list[Any]], list[Any]]
Engines = Callable[[], AbstractContextManager[Engine]]


@dataclass
class Outcome:
    """What came of a request.

    Attributes:
        ids, texts, ends: of each of its answers: tokens, text, why it ended.
        leads: of each answer that tells log-probabilities: by how much each token is likelier than the next one.
        error: kind and words of the error, if there was one.
    """

    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    leads: list[list[float]] = field(default_factory=list)
    error: str = ""

    def add(self, result: Result) -> None:
        """One more answer."""
        self.ids.append(result.token_ids)
        self.texts.append(result.text)
        self.ends.append(result.finish_reason)
        self.leads.append([_lead(told) for told in result.logprobs or () if len(told.top_logprobs) > 1])


def _lead(told: TokenLogprob) -> float:
    others = [other.logprob for other in told.top_logprobs if other.token_id != told.token_id]
    return told.logprob - max(others)


def difference(case: Case, wanted: Outcome, found: Outcome) -> str:
    """What is wrong with an answer; nothing where it is right."""
    if bool(wanted.error) != (case.kind in BAD):
        return f"the fresh engine itself: {wanted.error or 'no error'}"
    if wanted.error or found.error:
        # Which of a row's numbers is looked at first is told otherwise by the scheduler.
        short = (lambda text: text.partition(":")[0]) if case.kind == "spoilt" else str
        return "" if short(wanted.error) == short(found.error) else f"error {found.error!r}, not {wanted.error!r}"
    if case.kind == "cancelled":
        ids, all_of_them = found.ids[0], wanted.ids[0]
        if len(ids) < min(CUT, len(all_of_them)) or ids != all_of_them[: len(ids)]:
            return f"{ids} do not begin {all_of_them}"
        return "" if len(ids) == len(all_of_them) or found.ends == ["cancelled"] else f"ended by {found.ends}"
    for name in ("ids", "texts", "ends"):
        one, other = getattr(found, name), getattr(wanted, name)
        if one != other:
            return f"{name} {one}, not {other}"
    return ""


def parts_at_a_tie(right: Outcome, found: Outcome) -> bool:
    """Whether the first token that is another stands where the right one was hardly likelier than the next.

    A pass over several tokens, or rows, rounds otherwise than one over a single token, and which is taken depends on
    what a session holds, what was drafted, and who else is answered.
    """
    if right.error or found.error:
        return False
    for ids, others, leads in zip(right.ids, found.ids, right.leads, strict=False):
        place = next((i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), None)
        if place is not None:
            return place < len(leads) and abs(leads[place]) < TIE
    return False


def given(case: Case, pictures: Pictures) -> Given:
    """Images of every turn, and videos."""
    images = [[pictures.image(picture) for picture in turn.pictures] for turn in case.turns]
    return images, [pictures.video(video) for video in case.videos]


def asked(engine: Engine, case: Case, images: Given, **changes: Any) -> Outcome:
    """The plain way: each prompt with all that was said before it, by `Engine.generate`. Raises what it raises."""
    found, settings = Outcome(), {**case.settings, **changes}
    if case.kind == "list":
        for turn, shown in zip(case.turns, images[0], strict=True):
            found.add(engine.generate(turn.text, shown, **settings))
        return found
    if len(case.turns) == 1:
        found.add(engine.generate(case.turns[0].text, images[0][0], videos=images[1], **settings))
        return found
    for messages, shown in _grown(case, images[0], found):
        found.add(engine.generate(messages, shown, **settings))
    return found


def resent(session: Session, case: Case, images: Given, **changes: Any) -> Outcome:
    """A conversation that a client sends again with every turn, to a session that has read other ones."""
    found = Outcome()
    for messages, shown in _grown(case, images[0], found):
        found.add(session.generate(messages, shown, **{**case.settings, **changes}))
    return found


def sent(session: Session, case: Case, images: Given, **changes: Any) -> Outcome:
    """A conversation whose turns go to a new session."""
    found = Outcome()
    for turn, shown in zip(case.turns, images[0], strict=True):
        found.add(session.send(turn.text, shown, **{**case.settings, **changes}))
    session.close()
    return found


def _grown(case: Case, images: list[list[Any]], found: Outcome) -> Iterator[tuple[list[Any], list[Any]]]:
    """A conversation turn by turn, with the answers in `found`; of "edited", the second turn is said otherwise."""
    turns, shown = list(case.turns), list(images)
    for count in range(1, len(turns) + 1):
        if case.kind == "edited" and count == len(turns):
            turns[1], shown[1] = Turn("Repeat: 1, 2"), []
        messages: list[Any] = []
        for place, turn in enumerate(turns[:count]):
            messages = build_messages(turn.text, len(shown[place]), 0, None, messages)
            if place < count - 1:
                messages.append({"role": "assistant", "content": found.texts[place]})
        yield messages, [image for group in shown[:count] for image in group]


def drafting(engine: Engine, case: Case) -> dict[str, Any]:
    """The option that the case asks for, as far as the bundle has what it needs."""
    lacks = case.drafting == "mtp" and engine.graphs.manifest.graph(MTP) is None
    return {"speculate": "lookup" if lacks else case.drafting}


def gathered(chunks: Iterator[Chunk], most: int | None = None) -> Outcome:
    """What a stream says; it is broken off after `most` tokens."""
    found, ids, text = Outcome(), list[int](), ""
    for chunk in chunks:
        ids += chunk.token_ids
        text += chunk.text if chunk.kind == "text" else ""
        if chunk.result is not None:
            # What stands before a tag that closes no block was given out as text and stays so (`ReasoningSplitter`).
            said = text if chunk.result.reasoning == "" else text.partition(THINK_CLOSE)[2].lstrip("\n") or text
            if chunk.result.token_ids != ids or (chunk.result.text != said and not chunk.result.tool_calls):
                raise AssertionError(f"a stream said {ids} {text!r}, and its result {chunk.result}")
            found.add(chunk.result)
        elif most is not None and len(ids) >= most:
            return Outcome([ids], [text], ["cancelled"])
    return found


def guarded(run: Callable[[], Outcome]) -> Outcome:
    """What `run` gives, or the error it raises; one that is none of ours is told apart from all that is expected."""
    try:
        return run()
    except ExaoneError as reason:
        return Outcome(error=f"{type(reason).__name__}: {reason}")
    except Exception as reason:  # noqa: BLE001 - a soak goes on, and reports it
        return Outcome(error=f"not ours, {type(reason).__name__}: {reason}")


@contextmanager
def spoiling(engine: Engine, cases: Sequence[Case]) -> Iterator[None]:
    """Meanwhile the numbers of "spoilt" requests are NaN: logits after the prompt, and their row of the cache."""
    prompts = [engine.prompt(case.turns[0].text, enable_thinking=False).token_ids for case in cases]
    call, append = RowPasses.__call__, RowPasses.append

    def spoilt(ids: Any) -> bool:
        """Whether a prompt ends with these; what a session has read before is not among them."""
        if len(ids) > 1 or ids.shape[1] < _TELLING:
            return False
        piece = tuple(ids[0].tolist())
        return any(prompt[-len(piece) :] == piece for prompt in prompts)

    def calling(self: RowPasses, ids: Any, lengths: Any, keep: int = 1) -> Any:
        logits = call(self, ids, lengths, keep)
        return _spoil(self, 0, logits) if spoilt(ids) else logits

    def appending(self: RowPasses, row: int, ids: Any) -> Any:
        logits = append(self, row, ids)
        return _spoil(self, row, logits) if spoilt(ids) else logits

    setattr(RowPasses, "__call__", calling)  # noqa: B010 - a method is replaced, for a while
    setattr(RowPasses, "append", appending)  # noqa: B010
    try:
        yield
    finally:
        setattr(RowPasses, "__call__", call)  # noqa: B010
        setattr(RowPasses, "append", append)  # noqa: B010


def _spoil(passes: RowPasses, row: int, logits: Any) -> Any:
    for array in passes.cache.arrays():
        if array.dtype.kind == "f":
            array[row] = np.nan
    return np.full_like(logits, np.nan)


def right_answers(engines: Engines, cases: Sequence[Case], pictures: Pictures, file: Path) -> Mapping[str, Outcome]:
    """Answers by name, each of an engine of its own; those in `file` are there already, and new ones are added."""
    kept = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            name, outcome = json.loads(line)
            kept[name] = Outcome(**outcome)
    with file.open("a", encoding="utf-8") as out:
        for case in cases:
            if case.name in kept:
                continue
            with engines() as engine, spoiling(engine, [case] if case.kind == "spoilt" else []):
                images = given(case, pictures)
                kept[case.name] = guarded(lambda: asked(engine, case, images, logprobs=2))  # noqa: B023 - called at once
            out.write(json.dumps([case.name, asdict(kept[case.name])]) + "\n")
    return kept
