"""A graph's weights mapped into memory, and not held twice while ONNX Runtime reads them.

ONNX Runtime copies most weights into the layout of its kernels when it opens a graph. With one thread it gives back
each weight's file pages as soon as it is copied; with several, which is much faster, only when all are, so that for a
moment the weights are there twice. Here the mapping is ours, and pages that have been read are let go all the while.
What is used in place (lookup tables) comes back from the file as it is read.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, Final

from model.bundle import GraphInfo, bundle_path
from model.errors import BundleError
from runtime.meanwhile import meanwhile
from runtime.providers import onnxruntime

# ONNX Runtime takes mapped files without copying them since this version.
_SINCE: Final = (1, 31)
_IN_PLACE: Final = "session.use_external_initializer_file_buffers_directly"
_PARALLEL: Final = "session.prepack.enable_parallel"
# Between two releases: while a graph is opened, which reads everything, and while it runs.
_OPENING_S, _RUNNING_S = 0.01, 0.05


class MappedWeights:
    """The external data files of a graph, mapped; empty where that cannot be done.

    Keep it for as long as the session that it is lent to.

    Args:
        folder: the bundle.
        graph: its entry in the manifest; None maps nothing.
    """

    def __init__(self, folder: Path, graph: GraphInfo | None) -> None:
        self._files: dict[str, mmap.mmap] = {}
        self._sources: list[tuple[FileIO, os.stat_result]] = []
        version = tuple(int(part) for part in onnxruntime().__version__.split(".")[:2] if part.isdigit())
        if graph is None or not hasattr(mmap, "MADV_DONTNEED") or version < _SINCE:
            return
        home = PurePosixPath(graph.file).parent
        try:
            files = {}
            for name in graph.data:
                file = bundle_path(folder, name).open("rb", buffering=0)
                weakref.finalize(self, file.close)
                place = PurePosixPath(name).relative_to(home).as_posix()
                files[place] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._sources.append((file, os.fstat(file.fileno())))
        except (OSError, ValueError):
            self._sources.clear()
            return  # onnxruntime opens them itself, and says what is wrong with them
        self._files = files

    def check_unchanged(self) -> None:
        """Refuses to go on with files that were cut or written over since they were mapped; some microseconds.

        Reading behind a mapped file's new end would kill the process. A file that was removed, or has another one in
        its place, is still the one that was mapped.

        Raises:
            BundleError: names the file.
        """
        for file, before in self._sources:
            now = os.fstat(file.fileno())
            if now.st_size != before.st_size or now.st_mtime_ns != before.st_mtime_ns:
                why = "it was written to while it was open"
                raise BundleError("damaged bundle", Path(file.name).name, why, "Export or copy the bundle again")

    @property
    def bytes(self) -> int:
        """Size of all that is mapped."""
        return sum(len(data) for data in self._files.values())

    def lend(self, options: Any) -> None:
        """Makes a session with these options read the mapped files, with all of its threads."""
        if not self._files:
            return
        sizes = [len(data) for data in self._files.values()]
        options.add_external_initializers_from_files_in_memory(list(self._files), list(self._files.values()), sizes)
        options.add_session_config_entry(_IN_PLACE, "1")
        options.add_session_config_entry(_PARALLEL, "1")

    def release(self) -> None:
        """Lets go of the pages that have been read; the next to use one reads it again."""
        for data in self._files.values():
            data.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def released_meanwhile(self, running: bool = False) -> Iterator[None]:
        """Lets go of pages again and again, and at the end.

        Args:
            running: the graph is open and runs.
        """
        if not self._files:
            yield
            return
        try:
            with meanwhile(self.release, _RUNNING_S if running else _OPENING_S):
                yield
        finally:
            self.release()
