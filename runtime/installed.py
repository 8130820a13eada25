"""Which distributions have put files into onnxruntime's folder, told from their records; nothing is imported.

onnxruntime and onnxruntime-gpu (and others) are packages of one name. Installed together they overwrite one another,
and removing one takes files of the other away; installers do not mind, and nothing is said until CUDA does not load.
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePosixPath
from typing import Final

PACKAGE: Final = "onnxruntime"
GPU: Final = "onnxruntime-gpu"
# CUDA's and cuDNN's own wheels, as this distribution names the extras.
GPU_REQUIREMENT: Final = f"{GPU}[cuda,cudnn]"
_MARK: Final = f"{PACKAGE}/__init__.py"


@dataclass(frozen=True)
class Installed:
    """One distribution that owns a folder `onnxruntime`.

    Attributes:
        name, version: of the distribution.
        folder: the package's.
        present: how many of its own compiled files lie there as it brought them.
        replaced, missing: names of those that are another's, or gone.
    """

    name: str
    version: str
    folder: Path
    present: int = 0
    replaced: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all of its files are its own."""
        return not self.replaced and not self.missing


def installed_runtimes(path: Sequence[str] | None = None) -> tuple[Installed, ...]:
    """Every distribution that has an `onnxruntime` folder, in the order in which folders are searched.

    Args:
        path: folders to look in; None takes those of this process.
    """
    found = distributions() if path is None else distributions(path=list(path))
    unique: dict[tuple[str, Path], Installed] = {}
    for item in filter(None, map(_runtime, found)):
        unique.setdefault((item.name, item.folder), item)  # a folder may stand in the path twice
    return tuple(unique.values())


def sharing(found: Iterable[Installed]) -> tuple[Installed, ...]:
    """Those that lie in one folder with another, in the first folder where that is so."""
    by_folder: dict[Path, list[Installed]] = {}
    for item in found:
        by_folder.setdefault(item.folder, []).append(item)
    return next((tuple(group) for group in by_folder.values() if len(group) > 1), ())


def winner(group: Sequence[Installed]) -> Installed | None:
    """The one whose files are all there; None where each has lost some."""
    whole = [item for item in group if item.whole and item.present]
    return whole[0] if len(whole) == 1 else None


@dataclass(frozen=True)
class Mixed:
    """Several distributions in one folder.

    Attributes:
        what: names them, and whose files are there.
        remedy: the commands that repair it.
        with_gpu: whether onnxruntime-gpu's files are all there, so that it works until one of them is installed anew.
    """

    what: str
    remedy: str
    with_gpu: bool


def mixed_install(found: Iterable[Installed] | None = None) -> Mixed | None:
    """What is wrong where several distributions share the folder, else None."""
    group = sharing(installed_runtimes() if found is None else found)
    if not group:
        return None
    names = " and ".join(f"{item.name} {item.version}" for item in group)
    best = winner(group)
    files = f"its files are those of {best.name}" if best else "its files are of more than one"
    wanted = GPU_REQUIREMENT if any(item.name == GPU for item in group) else group[0].name
    remedy = f"pip uninstall -y {' '.join(item.name for item in group)} && pip install '{wanted}'"
    what = f"{names} are installed into one folder, and {files}"
    return Mixed(what, remedy, best is not None and best.name == GPU)


def _runtime(distribution: Distribution) -> Installed | None:
    # Metadata can be damaged in every way; what has no name is nobody's.
    name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
    if not name.startswith((PACKAGE, "ort-")):
        return None
    record = distribution.read_text("RECORD")  # Distribution.files leaves out what is missing, in some Pythons
    if record is None:  # only the name can tell
        return _unrecorded(name, distribution) if name in (PACKAGE, GPU) else None
    rows = [row for row in csv.reader(record.splitlines()) if len(row) == 3]
    if not any(row[0] == _MARK for row in rows):
        return None
    folder = Path(str(distribution.locate_file(PACKAGE)))
    present, replaced, missing = 0, [], []
    for file, digest, size in rows:
        if not _tells(PurePosixPath(file)):
            continue
        place = Path(str(distribution.locate_file(file)))
        if not place.is_file():
            missing.append(place.name)
        elif _is_recorded(place, size, digest):
            present += 1
        else:
            replaced.append(place.name)
    return Installed(name, distribution.version, folder, present, tuple(replaced), tuple(missing))


def _unrecorded(name: str, distribution: Distribution) -> Installed | None:
    folder = Path(str(distribution.locate_file(PACKAGE)))
    return Installed(name, distribution.version, folder) if folder.is_dir() else None


def _tells(file: PurePosixPath) -> bool:
    """Whether a file is one of those that say whose the folder is: the compiled ones, and the build's own note."""
    if file.parts[:2] != (PACKAGE, "capi"):
        return False
    return file.name == "build_and_package_info.py" or ".so" in file.suffixes or file.suffix in (".pyd", ".dll")


def _is_recorded(place: Path, size: str, digest: str) -> bool:
    """Whether a file is as a distribution brought it; sizes tell most of them apart, hashing 300 MB would take long."""
    if size.isdecimal() and place.stat().st_size != int(size):
        return False
    if not digest.startswith("sha256=") or place.suffix != ".py":
        return True
    own = base64.urlsafe_b64encode(hashlib.sha256(place.read_bytes()).digest()).rstrip(b"=").decode()
    return own == digest.removeprefix("sha256=")
