"""`inspect` meets the same bad checkpoints: one input of each kind that shows before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.faults import test_s_config, test_s_header, test_s_index, test_s_tensors
from tests.faults.harness import Case, bad, check_refusal, run_here, snapshot
from tests.faults.spoil import with_tensor

MODULES = (test_s_header, test_s_index, test_s_tensors, test_s_config)
CASES = [case for module in MODULES for test in vars(module).values() for case in getattr(test, "cases", ())]
# The first of each kind, those that need no process of their own before others.
FIRST: dict[str, Case] = {}
for case in sorted(CASES, key=lambda case: case.apart):
    if not case.options:
        FIRST.setdefault(case.row, case)


def test_every_kind_is_here() -> None:
    missing = {f"s{number:02}" for number in range(1, 40)} - set(FIRST)
    assert missing == {"s24", "s26", "s27", "s28", "s32"}  # accepted, or in the weights' values


@pytest.mark.parametrize("row", sorted(set(FIRST) - {"s19", "s22", "s34"}))
def test_inspect_refuses_likewise(row: str, tmp_path: Path) -> None:
    case: Case = FIRST[row]
    _, source, *_ = case.prepare(tmp_path)
    before = snapshot(tmp_path)
    outcome = run_here(("inspect", source))
    check_refusal(outcome, case.code, case.words, tmp_path)
    assert snapshot(tmp_path) == before


def test_inspect_names_what_export_refuses_as_unexpected(tmp_path: Path) -> None:
    hostile = "\x1b[2J" * 2000
    _, source, *_ = bad("s19 hostile", with_tensor(hostile, np.zeros(2, np.float32))).prepare(tmp_path)
    outcome = run_here(("inspect", source))
    assert outcome.code == 0
    assert outcome.stdout.replace("\n", "").isprintable()
    assert r"\x1b[2J" in outcome.stdout


def test_inspect_of_a_draft_head_that_the_configuration_does_not_know(tmp_path: Path) -> None:
    spoil = with_tensor("mtp.fc.weight", np.ones((64, 128), np.float32))
    _, source, *_ = bad("s22 draft head", spoil).prepare(tmp_path)
    outcome = run_here(("inspect", source, "--json"))
    outputs = json.loads(outcome.stdout)["graphs"][0]["outputs"]
    assert "logits" in outputs
    assert "hidden_states" not in outputs
