"""What the soak asks, and in what order: every tenth of it has the same requests, but for those that never come again.

Requests of a kind are numbered; kind, number and seed say all about one. Those of `NEVER_AGAIN` have other numbers in
every tenth, so that whatever is kept by content grows for ever if nothing bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from benchmarks.soak_pictures import BAD_FORMS, Picture, Video, forms, odd_size
from exaone_export.demo.tasks import Exercise, exercise

Mix = Mapping[str, int]

# Requests of each kind in a block, of those that the engine answers one after another, and of those of the scheduler.
ENGINE: Final[Mix] = {
    "copied": 1, "found": 2, "line": 2, "receipt": 1, "streamed": 1, "odd": 2, "two": 1, "drawn": 2, "held": 2,
    "stopped": 1, "cancelled": 2, "sent": 1, "resent": 1, "edited": 1, "list": 1, "frames": 1, "bad picture": 1,
    "bad option": 1, "spoilt": 1,
}  # fmt: skip
SCHEDULER: Final[Mix] = {
    "copied": 2, "found": 3, "line": 3, "receipt": 2, "odd": 2, "two": 1, "drawn": 2, "held": 2, "stopped": 2,
    "cancelled": 2, "bad picture": 1, "bad option": 1, "too long": 1, "spoilt": 1,
}  # fmt: skip
# Those that take a process of their own; so many in a tenth, however many blocks it has.
RARE: Final[Mix] = {"video file": 2}
NEVER_AGAIN: Final = ("copied", "sent")
BAD: Final = ("bad picture", "bad option", "too long", "spoilt")
_DRAFTING: Final = ("off", "lookup", "auto", "mtp")
_BAD_OPTIONS: Final[tuple[dict[str, Any], ...]] = (
    {"temperature": "hot"},
    {"top_p": 2.0},
    {"unheard_of": 1},
    {"regex": "(["},
    {"json_schema": {"type": "object", "minimum": "x", "not": {}}},
    {"json_schema": "{", "max_new_tokens": 5},
    {"regex": "a", "grammar": "start: /a/"},
    {"seed": -1},
    {"stop": [""]},
    {"fps": 2.0, "num_frames": 3},
)


@dataclass(frozen=True)
class Turn:
    """What a user says, and shows."""

    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        kind: a key of the mixes.
        number: among those of its kind and way.
        turns: one, but for conversations, and for "list" one for each of its prompts.
        videos: shown with the first turn.
        settings: arguments of `Engine.generate`.
        drafting: how the engine is told to draft; the answer is the same.
    """

    kind: str
    number: int
    turns: tuple[Turn, ...]
    videos: tuple[Video, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    drafting: str = "off"

    @property
    def name(self) -> str:
        """Of every request of the soak another."""
        return f"{self.kind} {self.number}"


@dataclass(frozen=True)
class Block:
    """Requests that are answered one after another, and such as are answered side by side."""

    tenth: int
    engine: tuple[Case, ...]
    scheduler: tuple[Case, ...]


@dataclass(frozen=True)
class Plan:
    """How much there is to ask.

    Attributes:
        seed: of everything.
        tenths: parts with the same requests.
        blocks: in each of them.
        context: tokens that the model takes.
        most: tokens of an answer.
    """

    seed: int
    tenths: int
    blocks: int
    context: int
    most: int

    @property
    def requests(self) -> int:
        """In all."""
        each = sum(ENGINE.values()) + sum(SCHEDULER.values())
        return self.tenths * (self.blocks * each + sum(RARE.values()))

    def all_blocks(self) -> Iterator[Block]:
        """In their order."""
        for tenth in range(self.tenths):
            shuffled = Random(f"{self.seed} {tenth}")
            ways = [self._shared_out(mix, way, tenth, shuffled) for way, mix in enumerate((ENGINE, SCHEDULER))]
            for number, case in enumerate(self._cases("video file", 0, RARE["video file"], 0)):
                ways[0][number * self.blocks // RARE["video file"]].append(case)
            for engine, scheduler in zip(*ways, strict=True):
                shuffled.shuffle(engine)
                shuffled.shuffle(scheduler)
                yield Block(tenth, tuple(engine), tuple(scheduler))

    def _shared_out(self, mix: Mix, way: int, tenth: int, shuffled: Random) -> list[list[Case]]:
        """A tenth's requests of one way, as many of each kind in every block."""
        blocks: list[list[Case]] = [[] for _ in range(self.blocks)]
        for kind, count in mix.items():
            cases = self._cases(kind, way, count * self.blocks, tenth)
            shuffled.shuffle(cases)
            for number, case in enumerate(cases):
                blocks[number % self.blocks].append(case)
        return blocks

    def _cases(self, kind: str, way: int, count: int, tenth: int) -> list[Case]:
        first = tenth * count if kind in NEVER_AGAIN else 0
        # Both ways are asked other things.
        return [self.case(kind, 2 * number + way) for number in range(first, first + count)]

    def case(self, kind: str, number: int) -> Case:
        """The request of this kind and number."""
        rng = Random(f"{self.seed} {kind} {number}")
        drafting = _DRAFTING[number // 2 % len(_DRAFTING)] if number % 2 == 0 else "off"
        settings: dict[str, Any] = {"max_new_tokens": self.most, "do_sample": False, "enable_thinking": False}
        if kind in ("sent", "resent", "edited", "list"):
            tasks = ("line", "copy", "receipt") if kind != "list" else ("find", "two", "copy", "line")
            turns = tuple(_turn(rng, task, number) for task in tasks)
            return Case(kind, number, turns, settings=settings, drafting=drafting)
        if kind in ("frames", "video file"):
            pages = tuple(page for _ in range(4) for page in exercise(rng, "line", held_out=True).pages)
            clip = Video(pages, (56 + 28 * (number % 3), 56), coded=kind != "frames")
            settings |= {"max_new_tokens": min(6, self.most)}
            return Case(kind, number, (Turn("Read this."),), (clip,), settings)
        turn = self._single(kind, number, rng)
        return Case(kind, number, (turn,), (), settings | self._options(kind, number), drafting)

    def _single(self, kind: str, number: int, rng: Random) -> Turn:
        if kind == "too long":
            return Turn("7" * (4 * self.context) if number % 4 < 2 else "7")
        task = {"copied": "copy", "spoilt": "copy", "found": "find", "two": "two"}.get(kind)
        if task is None:
            task = "receipt" if kind in ("receipt", "streamed", "stopped", "cancelled", "held") else "line"
        turn = _turn(rng, task, number)
        if kind == "spoilt":  # no other may begin or end like it
            return Turn(f"{turn.text} #{number:05}")
        if kind == "odd":
            return Turn(turn.text, tuple(Picture(one.page, one.form, odd_size(number)) for one in turn.pictures))
        if kind == "bad picture":
            bad = Picture(turn.pictures[0].page, forms(number // 2, BAD_FORMS))
            return Turn(turn.text, (*turn.pictures, bad))
        return turn

    def _options(self, kind: str, number: int) -> dict[str, Any]:
        """Settings that make a kind what it is."""
        place = number // 2
        amounts = {"type": "object", "additionalProperties": {"type": "number"}, "minProperties": 1 + place % 3}
        found: dict[str, dict[str, Any]] = {
            "drawn": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": number, "logprobs": place % 3},
            "held": {"json_schema": amounts} if place % 2 else {"regex": rf"\{{(.|\n){{1,{20 + place}}}\}}"},
            "stopped": {"stop": [("Total", '":', ",")[place % 3]]},
            "bad option": _BAD_OPTIONS[place % len(_BAD_OPTIONS)],
            "too long": {"max_new_tokens": self.context},
        }
        return found.get(kind, {})


def _turn(rng: Random, task: str, number: int) -> Turn:
    work: Exercise = exercise(rng, task, held_out=True)
    return Turn(work.prompt, tuple(Picture(page, forms(number // 2 + i)) for i, page in enumerate(work.pages)))


def distinct(blocks: Sequence[Block]) -> list[Case]:
    """Every request once."""
    cases = {case.name: case for block in blocks for case in (*block.engine, *block.scheduler)}
    return list(cases.values())
