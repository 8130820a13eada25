"""What `verify` measured, kept in the bundle: in verify.json, and in the model card with its entry in the manifest.

Three files change, each by a rename, in this order: verify.json, which names the card that goes with it; the card; the
manifest. So a card is sound if it is the manifest's or verify.json's, wherever a `verify` was stopped in between.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from exporter import disk
from exporter.card import CardFacts, model_card
from exporter.licence import read_licence
from model.bundle import CARD, MANIFEST, VERIFY, FileInfo, Manifest, bundle_path, file_sha256, read_manifest
from model.config import load_config
from model.errors import ExaoneError
from model.jsonfile import read_json_object

log = logging.getLogger("exaone_export.verify")
_ENTRY = "card"  # of verify.json: size and sha256 of the card with these figures


def keep_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Writes verify.json and the model card; a bundle that cannot be written keeps its old ones.

    Args:
        folder: the bundle.
        figures: plain values for JSON.
    """
    try:
        with _alone(folder):
            manifest = read_manifest(folder)
            licence = read_licence(folder, manifest.files)
            text = model_card(CardFacts(manifest, load_config(folder), licence, figures)).encode()
            card = FileInfo(len(text), hashlib.sha256(text).hexdigest())
            content = json.dumps({**figures, _ENTRY: asdict(card)}, indent=1, sort_keys=True) + "\n"
            _put(folder, VERIFY, content.encode())
            _put(folder, CARD, text)
            _put(folder, MANIFEST, replace(manifest, files={**manifest.files, CARD: card}).to_bytes())
    except OSError as reason:
        log.warning("the figures are not kept in the bundle: %s", reason.strerror)


def settle_card(folder: Path, manifest: Manifest) -> Manifest:
    """Finishes what a stopped `verify` began: enters the card in the manifest if it is the one of verify.json.

    Args:
        folder: the bundle.
        manifest: its manifest, as it is on disk.

    Returns:
        The manifest, with the card that is there if that is sound.
    """
    try:
        with _alone(folder):
            for name in (VERIFY, CARD, MANIFEST):
                if _draft(folder, name).exists():
                    disk.remove_file(_draft(folder, name))
            card, path = _card_of_figures(folder), bundle_path(folder, CARD)
            if card is None or card == manifest.files.get(CARD) or not path.is_file():
                return manifest
            if path.stat().st_size != card.size or file_sha256(path) != card.sha256:
                return manifest
            manifest = replace(manifest, files={**manifest.files, CARD: card})
            _put(folder, MANIFEST, manifest.to_bytes())
    except OSError as reason:
        log.info("%s is not brought up to date: %s", MANIFEST, reason.strerror)
    return manifest


def _card_of_figures(folder: Path) -> FileInfo | None:
    """The card that verify.json says goes with it."""
    with suppress(ExaoneError):
        entry = read_json_object(folder / VERIFY).get(_ENTRY)
        if isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str):
            return FileInfo(entry["size"], entry["sha256"])
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process rewrites this bundle's figures."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError, ImportError):  # a file system, or a system, without these locks
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _put(folder: Path, name: str, content: bytes) -> None:
    """Replaces a file in one step, durably."""
    draft = _draft(folder, name)
    try:
        disk.write_file(draft, content)
        disk.about_to("replace", folder / name)
        draft.replace(folder / name)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    disk.sync_folder(folder)


def _draft(folder: Path, name: str) -> Path:
    return folder / f".{name}.new"
