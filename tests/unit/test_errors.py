"""The error tree, and what the command line makes of every failure."""

from __future__ import annotations

import errno
import io
import json
import pickle
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from exaone_export import cli, failures, output
from model import errors
from model.errors import EnvironmentFault, ExaoneError, ResourceError, UsageError

EXIT_CODES = {
    "UsageError": 2,
    "CheckpointError": 3,
    "BundleError": 4,
    "EnvironmentFault": 5,
    "ResourceError": 6,
    "NumericalError": 7,
    "LockedError": 8,
}


def test_every_error_has_its_exit_code() -> None:
    subclasses = {error.__name__: error.exit_code for error in ExaoneError.__subclasses__()}
    assert subclasses == EXIT_CODES
    assert ExaoneError.exit_code == 1


def test_the_tree_is_drawn_in_the_docstring() -> None:
    assert all(f"{name}" in (errors.__doc__ or "") for name in EXIT_CODES)


def test_message_has_four_parts() -> None:
    error = UsageError("cannot read recipe", "my.toml", "unknown key 'bit'.", "Use bits.")
    assert str(error) == "cannot read recipe: my.toml: unknown key 'bit'. Use bits."
    assert str(UsageError("a", "b", "c")) == "a: b: c."


def test_errors_survive_pickling() -> None:
    error = errors.BundleError("a", "b", "c", "d")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.BundleError
    assert str(copy) == str(error)


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (UsageError("a", "b", "c"), UsageError, 2),
        (MemoryError(), ResourceError, 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ResourceError, 6),
        (RuntimeError("std::bad_alloc"), ResourceError, 6),
        (RuntimeError("can't start new thread"), ResourceError, 6),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), ResourceError, 6),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), ResourceError, 6),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError, 6),
        (OSError(errno.EFBIG, "File too large"), ResourceError, 6),
        (PermissionError(errno.EACCES, "Permission denied", "out"), ResourceError, 6),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "in"), UsageError, 2),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), EnvironmentFault, 5),
        (ModuleNotFoundError("No module named 'numpy.x'", name="numpy.x"), EnvironmentFault, 5),
        (KeyError("surprise"), ExaoneError, 1),
    ],
)
def test_failures_become_errors(failure: Exception, kind: type[ExaoneError], code: int) -> None:
    error = failures.explain(failure)
    assert type(error) is kind
    assert error.exit_code == code


def test_missing_export_library_names_the_extra() -> None:
    error = failures.explain(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert "exaone-export[export]" in str(error)


def test_internal_errors_show_no_addresses_and_stay_short() -> None:
    error = failures.explain(ValueError("bad <object at 0x7f00deadbeef>\nline 2\nline 3"))
    assert "0x7f00" not in str(error)
    assert "line 2" not in str(error)


def _run(command: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.supervise(command)
    return code, capsys.readouterr().err


def _raise(failure: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise failure

    return command


def test_supervise_prints_one_line_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _run(_raise(errors.BundleError("cannot load", "decoder.onnx", "damaged", "Export again")), capsys)
    assert (code, text) == (4, "error: cannot load: decoder.onnx: damaged. Export again.\n")


def test_internal_error_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _run(_raise(KeyError("surprise")), capsys)
    assert code == 1
    assert text.startswith("error: internal error: ")
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text


def test_debug_variable_adds_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failures.DEBUG_VARIABLE, "1")
    code, text = _run(_raise(KeyError("surprise")), capsys)
    assert code == 1
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("error: ")


def test_long_messages_are_cut_to_three_lines() -> None:
    text = failures.message_lines(ExaoneError("a", "b", "1\n2\n\n3\n4\n5"))
    assert text == "error: a: b: 1\n2\n3"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_and_exit(number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def command() -> int:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    result, text = _run(command, capsys)
    assert (result, cleaned) == (code, [True])
    assert text.startswith("error: interrupted")
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_within_exec_exits_130() -> None:
    """CPython would end by the signal; dataclasses run their methods through exec."""
    interrupted = "supervise(lambda: exec('raise KeyboardInterrupt'))"
    script = f"from exaone_export.cli import supervise; raise SystemExit({interrupted})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted")


def test_a_closed_stdout_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.supervise(lambda: 0) == 0
    sys.stdout.close()


def test_broken_pipe_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    # Outside pytest's capture: supervise points the real descriptor of a broken stdout to the null device.
    code, text = _run(_raise(BrokenPipeError()), capsys)
    assert (code, text) == (141, "")


def test_json_is_one_line_of_plain_types() -> None:
    stream = io.StringIO()
    output.print_json({"path": Path("a/b"), "nan": float("nan"), "items": (1, 2.5), "한": "글"}, stream)
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == {"path": "a/b", "nan": None, "items": [1, 2.5], "한": "글"}


def test_json_survives_names_that_are_not_utf8() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace")
    output.print_json({"path": b"caf\xe9".decode("utf-8", "surrogateescape")}, stream)
    stream.flush()
    assert json.loads(raw.getvalue()) == {"path": "caf\udce9"}


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (66e9, "66 GB")]
)
def test_human_bytes(size: float, text: str) -> None:
    assert output.human_bytes(size) == text


def test_stdout_is_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: Namespace) -> int:
        print("chatter")
        print("answer", file=arguments.stdout)
        return 0

    arguments = Namespace(quiet=False, verbose=False, run=run)
    assert cli.run_command(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "answer\n"
    assert captured.err == "chatter\n"
    assert sys.stdout is not sys.stderr
