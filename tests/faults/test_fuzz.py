"""The short form of `make fuzz`: some hundred mutants of every kind of input, always the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.bundle import MANIFEST, read_manifest
from model.errors import BundleError, ExaoneError, UsageError
from tests.fuzz.corpus import make_corpus
from tests.fuzz.parent import PRINTED, Settings, fuzz, mutant
from tests.fuzz.report import failed, figures, table
from tests.fuzz.selftest import KINDS, Selftest
from tests.fuzz.target import random_of, unsound
from tests.fuzz.targets import TARGETS

SEED = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), ("text",))


def test_no_crash_no_hang_no_wrong_accept(corpus: Path, tmp_path: Path) -> None:
    plan = [(name, target.short) for name, target in TARGETS.items()]
    settings = Settings(SEED, plan, corpus, tmp_path / "found", workers=1, limit_s=30.0)
    counted = figures(fuzz(settings, tmp_path / "workers"))
    found = [path.read_text() for path in sorted((tmp_path / "found").glob("*.json"))]
    assert not failed(counted), table(counted) + "\n".join(found)
    assert not (tmp_path / "found" / PRINTED).exists(), (tmp_path / "found" / PRINTED).read_text(errors="replace")
    assert all(counted[name]["mutants"] == count for name, count in plan)
    # Mutants that are all refused, or all accepted, would say little.
    assert counted["all"]["accepted"] > 200
    assert sum(counted["all"]["refused"].values()) > 1500


def test_what_must_not_happen_is_noticed(tmp_path: Path) -> None:
    """A crash of the process and a mutant without end are counted like an exception, and the others still run."""
    seed = 15  # one of each kind is among its first twelve
    kinds = [Selftest(tmp_path, tmp_path).mutant(random_of(seed, "selftest", index)) for index in range(12)]
    assert set(kinds) == set(KINDS)
    settings = Settings(seed, [("selftest", 12)], tmp_path, tmp_path / "found", workers=2, limit_s=2.0)
    counted = figures(fuzz(settings, tmp_path / "workers"))
    row, times = counted["selftest"], {kind: kinds.count(kind) for kind in KINDS}
    assert (row["mutants"], row["accepted"], row["refused"]) == (12, times[b"accepted"], {4: times[b"refused"]})
    assert (row["crashes"], row["hangs"]) == (times[b"raises"] + times[b"aborts"], times[b"endless"])
    assert row["wrong"] == times[b"wrong"]
    assert failed(counted)
    kept = {path.read_bytes() for path in (tmp_path / "found").glob("*.bin")}
    assert kept == {b"raises", b"wrong", b"aborts", b"endless"}


@pytest.mark.parametrize(
    "reason",
    [
        UsageError("cannot open bundle", "x", "another exit code"),
        BundleError("cannot open bundle", "x", "because\n" * 5),
        BundleError("cannot open bundle", "x", "y" * 3000),
        BundleError("cannot open bundle", "x", "<object at 0x7f8a2c3d4e5f>"),
        BundleError("cannot open bundle", "x", " "),
    ],
)
def test_a_refusal_has_to_be_a_good_one(reason: ExaoneError) -> None:
    assert unsound(reason, frozenset({4}))
    assert not unsound(BundleError("cannot open bundle", "x", "it is damaged"), frozenset({4}))


@pytest.mark.parametrize("name", ["header", "onnx", "image", "session"])
def test_a_mutant_depends_on_seed_target_and_index_alone(corpus: Path, tmp_path: Path, name: str) -> None:
    first = [mutant(corpus, tmp_path, name, SEED, index) for index in range(8)]
    assert first[5] == mutant(corpus, tmp_path, name, SEED, 5)
    assert len(set(first)) > 4
    assert first != [mutant(corpus, tmp_path, name, SEED + 1, index) for index in range(8)]
    assert random_of(1, "a", 2).random() != random_of(1, "b", 2).random()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool", None), ("dtype", 1.5), ("parameters", 1e-320), ("parameters", True), ("bits_per_weight", float("nan")),
        ("bits_per_weight", 10**400), ("schema_version", True), ("schema_version", 1.0), ("offload", "false"),
        ("libraries", [["a", "b"]]), ("notes", "abc"),
    ],
)  # fmt: skip
def test_a_manifest_says_what_it_says(corpus: Path, tmp_path: Path, key: str, value: object) -> None:
    raw = json.loads((corpus / "text-bundle" / MANIFEST).read_bytes())
    for name in raw["files"]:
        (tmp_path / name).touch()
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    assert read_manifest(tmp_path).tool == raw["tool"]
    (tmp_path / MANIFEST).write_text(json.dumps(raw | {key: value}))
    with pytest.raises(BundleError, match="wrong kind"):
        read_manifest(tmp_path)


def test_a_manifest_names_each_graph_and_tensor_once(corpus: Path, tmp_path: Path) -> None:
    raw = json.loads((corpus / "text-bundle" / MANIFEST).read_bytes())
    graph = raw["graphs"][0]
    twice = graph | {"inputs": [*graph["inputs"], graph["inputs"][0]]}
    text = graph | {"data": graph["data"][0]}
    negative = graph | {"outputs": [graph["outputs"][0] | {"shape": [-1]}, *graph["outputs"][1:]]}
    for graphs in ([graph, graph], [twice], [text], [negative]):
        (tmp_path / MANIFEST).write_text(json.dumps(raw | {"graphs": graphs}))
        with pytest.raises(BundleError, match="wrong kind"):
            read_manifest(tmp_path)
