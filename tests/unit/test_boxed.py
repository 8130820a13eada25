from __future__ import annotations

import pytest

from runtime.boxed import boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So it is \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{ 2 }", "2"),
        (r"\boxed {x}", "x"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{\text{the \boxed{inner} one}}", r"\text{the \boxed{inner} one}"),
        (r"\boxed{}", ""),
        (r"\boxed{done} but \boxed{cut of", "done"),
        (r"\boxed{cut \boxed{whole}", "whole"),
        (r"a stray { and } } \boxed{서울}", "서울"),
        (r"{ \boxed{7}", "7"),
        (r"\\boxed{line break, no command}", None),
        (r"\boxed", None),
        (r"\fbox{1} {boxed}", None),
        ("", None),
        ("\\boxed{two\nlines}", "two\nlines"),
    ],
)
def test_the_last_box(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_many_open_boxes_take_no_time() -> None:
    assert boxed(r"\boxed{" * 100_000) is None
    assert boxed(r"\boxed{" * 100_000 + "x" + "}" * 100_000) is not None
