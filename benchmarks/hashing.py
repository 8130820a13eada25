"""How fast `verify` hashes: one large file, and several side by side, against memory alone.

    python -m benchmarks.hashing --gigabytes 2 --folder FOLDER

Files of random bytes are written, read once so that they lie in memory, and hashed in turns with sha256 of bytes that
are there already, which is what the processor can do. The medians of the rounds are printed, in GB/s.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.bundle import FileInfo, Manifest, file_sha256
from model.progress import NullProgress

_PIECE = 64 << 20


def in_memory(size: int) -> None:
    """As many bytes that nobody reads from a file."""
    digest, piece = hashlib.sha256(), bytes(_PIECE)
    for _ in range(size // _PIECE):
        digest.update(piece)


def verified(folder: Path, files: list[Path]) -> None:
    """What `verify` does with the files of a bundle."""
    from exaone_export.integrity import check_files

    infos = {path.name: FileInfo(path.stat().st_size, "0" * 64) for path in files}
    manifest = Manifest("", {}, {}, "", "", "", "", "", (), {}, infos)
    found = check_files(folder, manifest, NullProgress())
    if set(found.values()) != {"its sha256 is not the manifest's"}:
        raise SystemExit(f"the files were not all hashed: {found}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="bytes in all")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the files; removed at the end")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = int(options.gigabytes * 1e9) // (2 * _PIECE) * 2 * _PIECE
    options.folder.mkdir(parents=True)
    try:
        one, halves = options.folder / "one", [options.folder / "first", options.folder / "second"]
        for path, share in ((one, size), *((half, size // 2) for half in halves)):
            with path.open("wb") as file:
                for _ in range(share // _PIECE):
                    file.write(os.urandom(_PIECE))

        def side_by_side() -> None:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(file_sha256, halves))

        ways: dict[str, Callable[[], None]] = {
            "sha256 of memory, one thread": lambda: in_memory(size),
            "one file (verify)": lambda: verified(options.folder, [one]),
            "two files, a thread each": side_by_side,
            "two files (verify)": lambda: verified(options.folder, halves),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
        for name, taken in times.items():
            speeds = sorted(size / seconds / 1e9 for seconds in taken)
            print(f"{name:45} {statistics.median(speeds):5.2f} GB/s  ({speeds[0]:.2f} to {speeds[-1]:.2f})")
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
