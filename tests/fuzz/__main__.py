"""Fuzzing: damaged and hostile inputs of every kind, made from a seed, run in processes of their own.

    python -m tests.fuzz [--seed 1] [--target header config] [--count N | --short] [--minutes M] [--workers 2]
    python -m tests.fuzz --target header --seed 1 --index 4711     # one input again

Without --count each target gets its own number, more than a million in all. Prints a table; the exit code says whether
anything crashed, hung, was wrongly accepted or needed too much memory. Failing inputs are written to --found.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from tests.fuzz.corpus import make_corpus
from tests.fuzz.parent import PRINTED, Settings, fuzz, mutant
from tests.fuzz.report import failed, figures, table
from tests.fuzz.target import tried
from tests.fuzz.targets import TARGETS

_MEMORY = Path("/dev/shm")


def main() -> int:
    """Runs what the command line asks for."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the workers are ended on the way out
    names = options.target or list(TARGETS)
    (options.found / PRINTED).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None, prefix="fuzz-") as folder:
        scratch = Path(folder)
        corpus = make_corpus(options.corpus or scratch / "corpus")
        if options.index is not None:
            return _again(corpus, scratch, names[0], options.seed, options.index)
        plan = [(name, options.count or getattr(TARGETS[name], "short" if options.short else "long")) for name in names]
        counted = figures(
            fuzz(
                Settings(
                    options.seed, plan, corpus, options.found, options.workers, options.limit, minutes=options.minutes
                ),
                scratch / "workers",
            )
        )
        print(table(counted))
        if options.json is not None:
            options.json.write_text(json.dumps({"seed": options.seed, "targets": counted}, indent=1) + "\n")
    wrong = failed(counted) or (options.found / PRINTED).exists()
    if wrong:
        print(f"failing inputs, and what was printed: {options.found}")
    return int(wrong)


def _again(corpus: Path, scratch: Path, name: str, seed: int, index: int) -> int:
    data = mutant(corpus, scratch, name, seed, index)
    target = TARGETS[name](corpus, scratch)
    outcome = tried(target, data)
    target.close()
    print(f"{len(data)} bytes: {data[:200]!r}")
    print(f"{outcome.kind} {outcome.code} {outcome.detail}")
    return int(outcome.kind in ("crash", "wrong"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), help="all without it")
    parser.add_argument("--count", type=int, help="mutants of each target")
    parser.add_argument("--short", action="store_true", help="the few mutants that the tests run")
    parser.add_argument("--index", type=int, help="run this one again, in this process")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for one mutant")
    parser.add_argument("--corpus", type=Path, help="where undamaged inputs are kept for the next time")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where failing inputs go")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
