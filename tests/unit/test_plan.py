"""The planner's arithmetic: the choice is the best one, the bound holds, and what belongs together stays together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exaone_export.planning.bound import Bound, parse_size, take_bound
from model.config import parse_config
from model.errors import UsageError
from quantize.plan import CHOICES, Group, Option, choose, comments, find_groups, plan_recipe, possible
from quantize.recipe import parse_recipe
from tests import tiny

LOSSES = st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5)


def options_of(losses: list[list[float]], sizes: tuple[int, ...] = (10, 13, 17, 30)) -> list[list[Option]]:
    return [
        [Option(scheme, size, loss) for scheme, size, loss in zip(CHOICES, sizes, own, strict=True)] for own in losses
    ]


def best(options: list[list[Option]], budget: int) -> float:
    """By trying everything."""
    sums = [
        sum(option.loss for option in chosen)
        for chosen in itertools.product(*options)
        if sum(option.bytes for option in chosen) <= budget
    ]
    return min(sums)


@given(LOSSES, st.integers(0, 25))
def test_a_budget_is_never_passed_and_the_choice_cannot_be_bettered_by_one_change(
    losses: list[list[float]], extra: int
) -> None:
    options = options_of(losses)
    budget = 10 * len(options) + extra
    chosen = choose(options, budget)
    assert chosen is not None
    used = sum(option.bytes for option in chosen)
    assert used <= budget
    for group, own in zip(options, chosen, strict=True):
        assert all(o.loss >= own.loss or used - own.bytes + o.bytes > budget for o in group)


def test_the_choice_is_close_to_the_best_of_all() -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        scales = 10.0 ** rng.uniform(-3, 0, 5)
        losses = [list(scale * np.array([1, 0.8, 0.6, 0.01]) * rng.uniform(0.9, 1.1, 4)) for scale in scales]
        options = options_of(losses)
        for budget in range(50, 150, 9):
            chosen = choose(options, budget)
            assert chosen is not None
            # A knapsack's greedy choice misses the best by less than its last step.
            assert sum(option.loss for option in chosen) <= best(options, budget) + max(map(max, losses))
    everything = choose(options, 150)
    assert everything is not None
    assert all(option.scheme.bits == 8 for option in everything)


def test_what_does_not_fit_is_none() -> None:
    assert choose(options_of([[1, 1, 1, 1]]), 9) is None


def test_sensitive_groups_get_the_bits() -> None:
    chosen = choose(options_of([[1.0, 0.8, 0.6, 0.01], [0.1, 0.08, 0.06, 0.001]]), 43)
    assert chosen is not None
    assert [option.scheme.bits for option in chosen] == [8, 4]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_groups_hold_what_is_joined_or_tied(kind: str) -> None:
    config = parse_config(tiny.make_config(kind))
    graph = "embedding" if kind == "vlm" else "decoder"
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
               "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    paths = [f"decoder.layers.{i}.{module}" for i in range(4) for module in modules]
    groups = find_groups(config, [*paths, f"{graph}.embed_tokens", "decoder.lm_head", "vision_encoder.blocks.0.a"])
    assert sorted(path for group in groups for path in group.paths if ".layers." in path) == sorted(paths)
    assert len([group for group in groups if group.layer is not None]) == 4 * 4
    assert len([group for group in groups if group.layer is None]) == (1 if kind == "dense" else 2)
    shapes = {path: (64, 128) for group in groups for path in group.paths}
    schemes = [possible(group, shapes, 4)[i % 4] for i, group in enumerate(groups)]
    chosen = [Option(scheme, size, 0.0) for scheme, size in schemes]
    recipe = plan_recipe("auto", groups, chosen)
    for group, option in zip(groups, chosen, strict=True):
        for path in group.paths:
            rule = recipe.match(path)
            assert rule is not None
            assert rule.scheme == option.scheme
    again = parse_recipe(comments(recipe, ["one", "two"]), "again")
    assert again == recipe


def test_choices_that_come_to_the_same_are_one() -> None:
    group = Group("lm_head", ("*.lm_head",), ("decoder.lm_head",))
    found = possible(group, {"decoder.lm_head": (512, 64)}, 4)
    assert [scheme.bits for scheme, _ in found] == [4, 4, 8]
    assert [size for _, size in found] == sorted(size for _, size in found)
    assert found[0][1] == 512 * (64 // 2 + 4 + 1)


@pytest.mark.parametrize(
    ("text", "size"), [("18GB", 18 * 10**9), ("1.5 GiB", 3 << 29), ("700", 700), (700, 700), ("2MB", 2_000_000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "18 gigabytes", "1e9", "٣GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_bounds_are_taken_out_of_the_options(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    options: dict[str, object] = {"bits_per_weight": 4.5, "force": False}
    assert take_bound(options, "auto", out) == Bound(tmp_path / "bundle.recipe.toml", 4.5)
    assert options == {"force": False}
    assert take_bound({}, "int4", out) is None
    assert take_bound({"max_bytes": "1GB"}, "auto", out) == replace(
        Bound(tmp_path / "bundle.recipe.toml"), max_bytes=10**9
    )


@pytest.mark.parametrize(
    ("options", "quantize"),
    [
        ({"bits_per_weight": 4.5}, "int4"),
        ({"max_bytes": "1GB"}, None),
        ({}, "auto"),
        ({"bits_per_weight": 4.5, "max_bytes": "1GB"}, "auto"),
        ({"bits_per_weight": 0}, "auto"),
        ({"bits_per_weight": float("nan")}, "auto"),
        ({"max_bytes": "much"}, "auto"),
        ({"bits_per_weight": 4.5, "low_disk": True}, "auto"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, object], quantize: str | None
) -> None:
    with pytest.raises(UsageError):
        take_bound(options, quantize, tmp_path / "bundle")


def test_a_plan_that_may_be_edited_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "bundle.recipe.toml").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        take_bound({"bits_per_weight": 4.5}, "auto", tmp_path / "bundle")
    assert take_bound({"bits_per_weight": 4.5, "force": True}, "auto", tmp_path / "bundle") is not None
