"""What the toolkit has written itself, and reads again: conversations, and the journals of batches and exports."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

import exaone_export as ee
from exaone_export.batching.journal import Journal, journal_path
from exporter import journal as parts_journal
from model.progress import NullProgress
from runtime.cache_state import parts_of
from runtime.engine import Engine
from runtime.reuse import KeptRow
from runtime.saved_media import pixels_of
from runtime.saved_session import MAGIC, Saved, read_session
from tests.fuzz.corpus import BOTH
from tests.fuzz.mutators import hostile, json_bytes, spoiled, spoiled_value, strict_json
from tests.fuzz.target import Target

_START = len(MAGIC) + 8
_DIGEST = 32


class Session(Target):
    """A saved conversation: damaged, or forged with a sha256 that fits."""

    name, codes = "session", frozenset({2, 4, 6})
    long = 60_000

    def __init__(self, corpus: Path, scratch: Path) -> None:
        super().__init__(corpus, scratch)
        self._engines: dict[str, Engine] = {}
        self._raw: dict[str, bytes] = {}
        for kind in BOTH:
            if (corpus / f"{kind}-session").exists():
                engine = ee.load(corpus / f"{kind}-bundle", threads=1)
                assert isinstance(engine, Engine)
                self._engines[kind] = engine
                self._raw[kind] = (corpus / f"{kind}-session").read_bytes()
                self.run(kind.encode() + b"\n" + self._raw[kind])

    def mutant(self, random: Random) -> bytes:
        kind = random.choice(list(self._raw))
        raw, end = self._raw[kind], len(self._raw[kind]) - _DIGEST
        length = int.from_bytes(raw[_START - 8 : _START], "little")
        chance = random.random()
        if chance < 0.3:
            return kind.encode() + b"\n" + spoiled(raw, random, end=random.choice((len(raw), _START + length)))
        header, tail = raw[_START : _START + length], raw[_START + length : end]
        if chance < 0.8:
            value = json.loads(header)
            if random.random() < 0.4:
                value |= {random.choice(("messages", "tools", "media", "keys", "copies")): hostile(random)}
            header = json_bytes(spoiled_value(value, random), random)
        else:
            tail = spoiled(tail, random)
        off = random.choice((0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 1 << 40))
        data = MAGIC + ((len(header) + off) % (1 << 64)).to_bytes(8, "little") + header + tail
        return kind.encode() + b"\n" + data + hashlib.sha256(data).digest()

    def run(self, data: bytes) -> Saved:
        kind, _, raw = data.partition(b"\n")
        engine, path = self._engines[kind.decode()], self.scratch / "session"
        path.write_bytes(raw)
        graphs = engine.graphs
        return read_session(path, graphs, engine.requests.media, lambda: KeptRow(graphs.forward(1), NullProgress()))

    def judge(self, data: bytes, accepted: Saved) -> str:
        """All that the file holds, and nothing else, must be what was read."""
        raw = data.partition(b"\n")[2]
        if hashlib.sha256(raw[:-_DIGEST]).digest() != raw[-_DIGEST:]:
            return "its sha256 is another"
        length = int.from_bytes(raw[_START - 8 : _START], "little")
        header, tail = strict_json(raw[_START : _START + length]), raw[_START + length : -_DIGEST]
        held = b"".join(pixels_of(medium) for medium in accepted.media)
        if accepted.row is not None:
            row = accepted.row
            arrays = [*parts_of(row.cache), *(part for copy in row.copies for part in copy.arrays)]
            held += b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
            keys = sum(key if isinstance(key, int) else 0 for key in row.keys)
            if keys != sum(key for key in header["keys"] if isinstance(key, int)):
                return "other tokens"
            if [copy.length for copy in row.copies] != header["copies"] or len(row.keys) != row.cache.lengths[0]:
                return "other lengths"
        elif header.get("keys") is not None:
            return "the cache is left out"
        if held != tail:
            return "other bytes of images or of the cache"
        stated = header.get("messages") or []
        if [turn["role"] for turn in stated] != [turn["role"] for turn in accepted.messages]:
            return "other turns"
        texts = [(a["content"], b["content"]) for a, b in zip(stated, accepted.messages, strict=True) if "content" in a]
        if any(isinstance(one, str) and one != other for one, other in texts):
            return "other texts"
        return "" if (header.get("tools") or None) == (accepted.tools or None) else "other tools"

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


def checked(text: bytes) -> bytes:
    """A line of a journal."""
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def sound_lines(data: bytes) -> list[Any]:
    """The values of the lines from the beginning whose checksums hold."""
    found = []
    for line in data.split(b"\n")[:-1]:
        check, _, text = line.partition(b" ")
        if check != hashlib.sha256(text).hexdigest()[:16].encode():
            break
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            break
    return found


def spoiled_journal(values: list[Any], random: Random) -> bytes:
    """A journal with damaged bytes, or with forged lines."""
    good = b"".join(checked(json.dumps(value).encode()) for value in values)
    if random.random() < 0.5:
        return spoiled(good, random)
    place = random.randrange(len(values))
    forged = json_bytes(spoiled_value(values[place], random), random)
    if random.random() < 0.3:
        forged = spoiled(forged, random)
    all_lines = [json.dumps(value).encode() for value in values]
    return b"".join(checked(text) for text in (*all_lines[:place], forged, *all_lines[place + 1 :]))


class BatchJournal(Target):
    """What `batch` has answered so far."""

    name, codes = "batch_journal", frozenset({2})
    long = 30_000
    _header: Final = {"bundle": "a", "input": "b"}

    def mutant(self, random: Random) -> bytes:
        answers = [{"line": number, "id": f"r{number}", "text": "가 x", "n": [1, 2]} for number in (1, 2, 4)]
        return spoiled_journal([{"format": 1, "header": self._header}, *answers], random)

    def run(self, data: bytes) -> list[Any]:
        out = self.scratch / "answers.jsonl"
        journal_path(out).write_bytes(data)
        journal = Journal(out, self._header)
        try:
            return list(journal.records())
        finally:
            journal.close()

    def judge(self, data: bytes, accepted: list[Any]) -> str:
        there = sound_lines(data)[1:]
        return "" if all(record in there for record in accepted) else "an answer that the file does not have"


class ExportJournal(Target):
    """What an export has written so far."""

    name, codes = "export_journal", frozenset[int]()
    long = 20_000

    def mutant(self, random: Random) -> bytes:
        header = parts_journal.Header(
            {"a": "b"}, {"c": "1"}, {"config.json": "0" * 64}, "d", {"config.json": (1, 2, 3)}
        )
        tensor = parts_journal.Tensor("w", "decoder.onnx.data", 0, 64, "0" * 64)
        entries = [parts_journal.Entry(f"part {n}", (tensor,), {"s": b"abc"}).to_json() for n in range(3)]
        first = {
            "format": 1,
            **{name: getattr(header, name) for name in ("options", "versions", "source", "graphs", "stamps")},
        }
        return spoiled_journal([first, *entries], random)

    def run(self, data: bytes) -> list[str]:
        path = self.scratch / "journal.jsonl"
        path.write_bytes(data)
        journal = parts_journal.Journal.reopen(path)
        if journal is None:
            return []
        try:
            parts_journal.read_last(path)
            return [entry.part for _, entry in journal._lines]
        finally:
            journal.close()

    def judge(self, data: bytes, accepted: list[str]) -> str:
        there = sound_lines(data)[1:]
        stated = [value["part"] for value in there[: len(accepted)]]
        return "" if accepted == stated else "a part that the file does not have"
