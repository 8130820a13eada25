"""One command line under limits of memory and CPU time; writes what it took, as JSON, to the file that it is given.

    python child.py FIGURES ADDRESS_SPACE_BYTES CPU_SECONDS ARGUMENTS...

The exit code, stdout and stderr are the command's own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def peak_kib() -> int:
    """The most memory of this process; `ru_maxrss` would count that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(figures: str, space: str, cpu: str, *arguments: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (int(space), int(space)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu), int(cpu)))
    import exporter.export
    import exporter.source  # noqa: F401
    from exaone_export import cli

    idle, started, used = peak_kib(), time.perf_counter(), time.process_time()
    code = cli.main(arguments)
    taken = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "megabytes": (peak_kib() - idle) / 1024,
        "idle_megabytes": idle / 1024,
    }
    Path(figures).write_text(json.dumps(taken), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
