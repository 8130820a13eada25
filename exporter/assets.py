"""The files a bundle takes over from the checkpoint, byte for byte: configuration, tokenizer, template, licence."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from exporter.disk import write_file
from exporter.licence import is_licence
from model.bundle import SOURCE_FILES, FileInfo
from model.errors import CheckpointError
from model.jsonfile import MAX_BYTES
from model.shards import ordinary_file
from model.tasks import GENERATION, IMAGE_FEATURE_EXTRACTION, TEXT_GENERATION

log = logging.getLogger("exaone_export.exporter")


def find_assets(folder: Path) -> dict[str, Path]:
    """Name → path of the files to take over, as far as the folder has them.

    Raises:
        BundleError: a link leads outside the folder.
        CheckpointError: one is not an ordinary file, or too large to be what its name says.
    """
    licences = sorted(path.name for path in folder.iterdir() if is_licence(path.name) and not path.is_dir())
    names = [name for name in SOURCE_FILES if (folder / name).exists() or (folder / name).is_symlink()]
    found = {name: ordinary_file(folder, name) for name in dict.fromkeys((*names, *licences))}
    for name, path in found.items():
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError("cannot read checkpoint", name, f"{size} bytes, more than the {MAX_BYTES} allowed")
    return found


def missing_assets(found: Mapping[str, Path], task: str = TEXT_GENERATION, *, vision: bool) -> tuple[str, ...]:
    """What a bundle without some of these files cannot do, one sentence each; also logged as warnings."""
    notes = []
    if "tokenizer.json" not in found and task != IMAGE_FEATURE_EXTRACTION:
        notes.append("The checkpoint has no tokenizer.json: the bundle runs on token ids, not on text.")
    elif task in GENERATION and "chat_template.jinja" not in found and "tokenizer_config.json" not in found:
        notes.append("The checkpoint has no chat template: the bundle takes plain prompts only.")
    if vision and "preprocessor_config.json" not in found:
        notes.append("The checkpoint has no preprocessor_config.json: images are prepared as EXAONE 4.5 was published.")
    for note in notes:
        log.warning("%s", note)
    return tuple(notes)


def copy_assets(found: Mapping[str, Path], folder: Path) -> dict[str, FileInfo]:
    """Copies the files into `folder`; returns size and hash of each.

    Raises:
        CheckpointError: one cannot be read any more.
    """
    infos = {}
    for name, path in found.items():
        try:
            content = path.read_bytes()
        except OSError as reason:
            raise CheckpointError("cannot read checkpoint", name, reason.strerror or "it cannot be read") from None
        write_file(folder / name, content)
        infos[name] = FileInfo(len(content), hashlib.sha256(content).hexdigest())
    return infos
