"""A hub model as a checkpoint folder before its weights are here.

The small files are real. Each shard is a placeholder: a sparse file of the right size with the true header, so that
everything that can be known without weights is checked, in the usual way, before gigabytes are fetched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.hub import HubModel, needed_shards
from model.errors import CheckpointError
from model.jsonfile import MAX_BYTES
from model.progress import NullProgress, Progress
from model.shards import PICKLED

WHAT = "cannot read checkpoint"
_FIRST_READ = 1 << 16  # bytes; most headers are shorter
_LONGEST_HEADER = 100_000_000  # what the safetensors library accepts
_LARGEST = 1 << 50  # bytes of a file


@contextmanager
def peek_source(model_id: str, revision: str | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """A temporary folder with a hub model's small files and placeholders of its shards; some megabytes are fetched.

    Args:
        model_id: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
        progress: told how far it is.

    Raises:
        UsageError, EnvironmentFault, CheckpointError, ResourceError: as `HubModel.find` and `HubModel.fetch`.
    """
    model = HubModel.find(model_id, revision)
    if model.files is None:
        yield model.snapshot
        return
    with TemporaryDirectory(prefix="exaone-export-") as name:
        folder = Path(name, model_id.rpartition("/")[2])
        make_placeholders(model, folder, progress or NullProgress())
        yield folder


def make_placeholders(model: HubModel, folder: Path, progress: Progress) -> list[str]:
    """Fills a new folder with the small files and the placeholders; returns the names of those.

    Raises:
        CheckpointError: a file is damaged, or of an impossible size.
        EnvironmentFault, ResourceError: as `HubModel.fetch`.
    """
    assert model.files is not None
    folder.mkdir(parents=True)
    small = [file for name, file in model.files.items() if not name.endswith(".safetensors")]
    progress.start("fetching configuration", sum(file.size for file in small if file.size <= MAX_BYTES), "bytes")
    for file in small:
        if file.size > MAX_BYTES:  # no configuration: it is refused for its size, which costs no download
            _write_sparse(folder / file.name, b"", file.size)
            continue
        shutil.copyfile(model.fetch(file.name), folder / file.name)
        progress.advance(file.size)
    progress.finish()
    shards = needed_shards(folder, model.files)
    progress.start("reading headers", len(shards), "files")
    for name in shards:
        if model.files[name].sha256:
            _write_sparse(folder / name, _header(model, name), model.files[name].size)
        else:  # small enough for git
            shutil.copyfile(model.fetch(name), folder / name)
        progress.advance(1)
    progress.finish()
    if not shards:
        # What the refusal of such a model names; nobody opens it.
        for name in model.others:
            if name.endswith(PICKLED) and "/" not in name:
                (folder / name).touch()
    return [name for name in shards if model.files[name].sha256]


def same_header(placeholder: Path, path: Path) -> bool:
    """Whether a file begins with the header that its placeholder promised."""
    with placeholder.open("rb") as promised, path.open("rb") as true:
        length = promised.read(8)
        count = min(int.from_bytes(length, "little"), _LONGEST_HEADER)
        return true.read(8) == length and true.read(count) == promised.read(count)


def _header(model: HubModel, name: str) -> bytes:
    """Length and header of a shard; the length alone where it is absurd, which the check of headers refuses."""
    start = model.start_of(name, _FIRST_READ)
    count = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or count > 8 + _LONGEST_HEADER:
        return start[:8]
    if count > len(start) == _FIRST_READ:
        start = model.start_of(name, count)
    return start[:count]


def _write_sparse(path: Path, content: bytes, size: int) -> None:
    if size > _LARGEST:
        raise CheckpointError(WHAT, path.name, f"the hub says it has {size} bytes, more than a file can have")
    with path.open("xb") as stream:
        stream.write(content)
        stream.truncate(size)
