"""Exercises of the demonstration: the answer is on the page, none is in both parts, and drawing them is repeatable."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.tasks import MEASURED, gained, part_of, score, share, stored, tables
from exaone_export.demo.exam import THINK, Asked, draw, right
from exaone_export.demo.receipts import Receipt, layout, random_receipt
from exaone_export.demo.render import GRID, render_page, text_width
from exaone_export.demo.tasks import LEVELS, QUESTIONS, TASKS, WINDOW, Exercise, exercise
from exaone_export.demo.texts import is_held_out
from training.batches import THINKING, Batches, encode, expanded, prompt_text, sequence
from training.pixels import BLANK, IGNORED, PRICE, page_targets

HARDEST = [task for task in TASKS if task != "copy"]


def _split_text(work: Exercise) -> list[str]:
    """What the checksum that puts an exercise into its part is taken of."""
    if work.task == "find":
        return [work.prompt.rpartition("\n")[0]]
    if work.task in ("receipt", "question"):
        texts = [piece.text for piece in work.pages[0].pieces]
        return [Receipt(tuple(zip(texts[:-2:2], texts[1:-2:2], strict=True))).json()]
    return [page.pieces[0].text for page in work.pages] or [work.answer]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [True, False])
def test_no_exercise_is_in_both_parts(task: str, held_out: bool) -> None:
    rng = Random(3)
    for level in range(len(LEVELS[task])):
        for _ in range(20):
            work = exercise(rng, task, held_out, level)
            assert [is_held_out(text) for text in _split_text(work)] == [held_out] * len(_split_text(work))


@pytest.mark.parametrize("task", HARDEST)
def test_same_seed_draws_the_same(task: str) -> None:
    first, second = (exercise(Random(8), task, held_out=True) for _ in range(2))
    assert first == second
    for left, right_page in zip(first.pages, second.pages, strict=True):
        assert np.array_equal(np.array(render_page(left)), np.array(render_page(right_page)))
    assert exercise(Random(9), task, held_out=True) != first


def test_receipts_add_up_and_fit_their_page() -> None:
    rng = Random(5)
    for number in range(200):
        receipt = random_receipt(rng, held_out=False)
        assert 2 <= len(receipt.lines) <= 5
        shown = json.loads(receipt.json())
        *amounts, total = shown.values()
        assert list(shown) == [name for name, _ in receipt.lines]
        assert round(sum(amounts), 2) == total
        page = layout(rng, receipt, loose=number % 2 == 0)
        if page is None:
            continue
        assert (page.width % GRID, page.height % GRID) == (0, 0)
        for name, amount in zip(page.pieces[::2], page.pieces[1::2], strict=True):
            assert name.left + text_width(name.text, page.font_size) < amount.left
            assert amount.left + text_width(amount.text, page.font_size) <= page.width
            assert page.height > amount.top + 0.62 * page.font_size


def test_questions_have_their_answer_on_the_page() -> None:
    rng, kinds = Random(6), set()
    for _ in range(200):
        work = exercise(rng, "question", held_out=False)
        texts = [piece.text for piece in work.pages[0].pieces]
        kinds.add(work.kind)
        if work.kind == "items":
            assert int(work.answer) == len(texts) // 2 - 1
        elif work.kind == "total":
            assert texts[-2:] == ["Total", work.answer]
        elif work.kind == "line":
            number = int("".join(filter(str.isdigit, work.prompt)))
            assert texts[2 * number - 1] == work.answer
        else:
            (name,) = [one for one in texts[:-2:2] if one in work.prompt.replace("?", " ").split()]
            at = texts.index(name)
            assert work.answer == (texts[at + 1] if work.kind == "price" else str(at // 2 + 1))
    assert kinds == set(QUESTIONS)


def test_two_images_are_asked_for_either() -> None:
    rng, kinds = Random(7), set()
    for _ in range(60):
        work = exercise(rng, "two", held_out=False)
        kinds.add(work.kind)
        assert work.pages[work.kind == "second"].pieces[0].text == work.answer
        assert (work.kind in work.prompt) is work.prompt.isascii()
    assert kinds == {"first", "second"}


def test_values_to_look_up_stand_farther_back_than_the_window() -> None:
    rng = Random(8)
    for _ in range(60):
        work = exercise(rng, "find", held_out=True)
        prompt, _ = sequence(work, thinking=False)
        entry = next(line for line in work.prompt.split("\n") if line.endswith(f"={work.answer}"))
        assert entry[:2] == work.prompt[-3:-1]
        before = prompt_text(work, False).partition(f"\n{entry}\n")[0] if f"\n{entry}\n" in work.prompt else ""
        assert len(prompt) - len(encode(before)) - len(encode(f"\n{entry}")) > WINDOW


def test_prompts_have_an_image_token_for_each_grid_cell() -> None:
    work = exercise(Random(9), "two", held_out=False)
    prompt, answer = sequence(work, thinking=True)
    assert prompt.count(67) == sum(page.width * page.height // GRID**2 for page in work.pages)
    assert answer[-1] == 53
    assert expanded([1, 67, 2, 67], [2, 3]) == [1, 67, 67, 2, 67, 67, 67]


def test_targets_name_every_character_with_its_place_and_line() -> None:
    page = layout(Random(2), Receipt((("Tea", "1.20"), ("Milk", "10.00"))), loose=False)
    assert page is not None
    characters, first, line = (part.reshape(page.height // GRID, -1, *part.shape[1:]) for part in page_targets(page))
    for row, text in enumerate(("Tea1.20", "Milk10.00", "Total11.20")):
        found = characters[row].flatten()
        assert "".join(chr(33 + code) for code in found[found != BLANK]) == text
        assert set(line[row].flatten().tolist()) == {row, IGNORED}
        assert 0 in first[row]
        assert PRICE in first[row]


@pytest.mark.parametrize("task", MEASURED)
def test_measured_samples_differ_and_are_held_out(task: str) -> None:
    work = list(draw(task, 24, 3))
    assert work == list(draw(task, 24, 3))
    assert work != list(draw(task, 24, 4))
    assert len({one.work for one in work}) == 24
    assert all(one.thinking is (task == THINK) for one in work)
    assert all(is_held_out(text) for one in work for text in _split_text(one.work))


def test_an_answer_counts_only_whole() -> None:
    work = exercise(Random(1), "receipt", held_out=True)
    plain, thinking = Asked(work, False), Asked(work, True)
    assert right(plain, ("", work.answer))
    assert not right(plain, ("", work.answer[:-1]))
    assert not right(plain, (work.reasoning, work.answer))
    assert right(thinking, (work.reasoning, work.answer))
    assert not right(thinking, ("", work.answer))
    figures = score([plain, plain], [("", work.answer), ("", "")])
    assert (figures["right"], figures["kinds"], figures["marks"]) == (1, {work.kind: [1, 2]}, "10")
    assert figures["wrong"] == [(work.prompt, work.answer, "", "")]


def test_figures_are_kept_and_shown_beside_the_float_ones(tmp_path: Path) -> None:
    key = {"weights": "ab", "samples": 4}
    rows = [
        {"recipe": recipe, "task": "line", **key, "right": marks.count("1"), "marks": marks, "kinds": {"line": [2, 4]}}
        for recipe, marks in (("none", "1110"), ("int4", "1001"))
    ]
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row | change) + "\n" for row in rows for change in ({}, {"weights": "other"})))
    cells = stored(file, key)
    assert set(cells) == {("none", "line"), ("int4", "line")}
    assert cells["int4", "line"]["marks"] == "1001"
    assert stored(tmp_path / "missing", key) == stored(None, key) == {}
    text = "\n".join(tables(cells, ["none", "int4", "int8"], ["line", "find"]))
    assert f"| none | {share(3, 4)} |  |" in text
    assert f"| int4 | {share(2, 4)} -25.00 ± 41.46 |  |" in text
    assert f"| line | line | {share(2, 4)} | {share(2, 4)} |  |" in text
    assert gained("1111", "1010") == "+50.00 ± 25.00"


def test_work_is_divided_into_parts() -> None:
    assert [part_of(text) for text in ("1/1", "2/3")] == [(0, 1), (1, 3)]
    for text in ("0/2", "3/2", "1", "a/b", "/"):
        with pytest.raises(argparse.ArgumentTypeError):
            part_of(text)


def test_batches_hold_one_task_and_one_size() -> None:
    batches = Batches(1, 4)
    batch = batches.batch("two", 0)
    assert len(batch.images) == 2
    assert (batch.labels != IGNORED).any(1).all()
    assert batches.choose({"line": 0.0, "find": 1.0}) == "find"
    assert 0 < THINKING < 0.5
    sample = batches.sample("question", 1)
    assert sample.sizes == tuple((page.height, page.width) for page in replace(sample.exercise).pages)
