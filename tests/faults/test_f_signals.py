"""SIGINT and SIGTERM: a soon end, one line, the exit code of the signal, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli, failures
from exporter import disk
from tests.faults import crash
from tests.faults.crash import Fault, beside, child, tree

CODES = {signal.SIGINT: failures.INTERRUPTED, signal.SIGTERM: failures.TERMINATED}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return crash.small_checkpoint(tmp_path / "source", assets=False)


def command(source: Path, out: Path, *flags: str) -> Callable[[], Any]:
    """The command line, which ends the child's process with its exit code."""
    return lambda: os._exit(_as_a_process("export", str(source), str(out), "--quantize", "int4", *flags))


def _as_a_process(*arguments: str) -> int:
    sys.argv = ["exaone-export", *arguments]
    return cli.main()


def signals_from(point: int, *numbers: int, until: int = 1 << 30) -> Fault:
    """At a change of the disk the first signal, at each later one the next, the last again and again."""

    def fault(count: int, operation: str, path: Path) -> None:
        if point <= count <= until:
            os.kill(os.getpid(), numbers[min(count - point, len(numbers) - 1)])

    return fault


def points_of(source: Path, folder: Path) -> int:
    _, seen = child(crash.export(source, folder / "calm"), folder / "notes")
    return len(seen.operations)


@pytest.mark.parametrize("number", list(CODES))
def test_f06_f08_a_signal_at_any_point(
    source: Path, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    codes = []
    for point in range(1 + number % 4, points_of(source, tmp_path) + 1, 4):
        status, _ = child(command(source, out), tmp_path / "notes", signals_from(point, number, until=point))
        codes.append(os.waitstatus_to_exitcode(status))
        error = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
        if codes[-1] == CODES[number]:
            assert error == [f"error: interrupted: {number.name}: stopped on request."]
        if out.exists():  # the signal came when all was done
            assert len(tree(out)) > 4
            disk.remove_tree(out)
        assert beside(out) == []
    assert set(codes[:-4]) == {CODES[number]}


def test_f06_keep_partial(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    interrupted = signals_from(60, signal.SIGINT, until=60)
    status, _ = child(command(source, out, "--keep-partial"), tmp_path / "notes", interrupted)
    assert os.waitstatus_to_exitcode(status) == failures.INTERRUPTED
    assert "what is done is kept in out.partial-" in capfd.readouterr().err
    assert len(beside(out)) == 1
    status, _ = child(command(source, out, "--resume"), tmp_path / "notes")
    assert status == 0
    assert "\nresumed " in capfd.readouterr().out
    child(command(source, tmp_path / "calm"), tmp_path / "notes")
    assert tree(out) == tree(tmp_path / "calm")
    assert beside(out) == []


@pytest.mark.parametrize("point", [2, 5, 12, 30, 60])
def test_f07_signals_at_each_step_of_the_clean_up(source: Path, tmp_path: Path, point: int) -> None:
    """From Python, where each of them raises."""
    out = tmp_path / "deep" / "out"
    _, seen = child(crash.export(source, out), tmp_path / "notes", signals_from(point, signal.SIGINT))
    assert seen.outcome.rstrip().endswith("KeyboardInterrupt")
    assert len(seen.operations) > point
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_f07_more_signals_during_the_clean_up(
    source: Path, tmp_path: Path, numbers: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """One at each change of the disk that the clean-up makes."""
    out = tmp_path / "deep" / "out"
    for point in range(20, points_of(source, tmp_path) - 12, 7):
        status, _ = child(command(source, out), tmp_path / "notes", signals_from(point, *numbers))
        assert os.waitstatus_to_exitcode(status) in CODES.values()
        error = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert error in ([f"error: interrupted: {number.name}: stopped on request."] for number in CODES)
        assert not (tmp_path / "deep").exists()


def test_f07_a_hail_of_signals(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """From another process, as fast as it can, until the command has ended."""
    for point in (20, 35, 50):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os._exit(_hailed(source, tmp_path / "out", tmp_path / "notes", point))
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == failures.INTERRUPTED
        assert "Traceback" not in capfd.readouterr().err
        assert beside(tmp_path / "out") == []
        assert not (tmp_path / "out").exists()


def test_f08_an_interruption_that_gets_lost_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception in a destructor goes nowhere; the command ends all the same, and nothing tells of it."""

    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def command() -> int:
        Destroyed()
        time.sleep(crash.LONGEST)
        return 0

    assert cli.supervise(command) == failures.TERMINATED
    assert capsys.readouterr().err == "error: interrupted: SIGTERM: stopped on request.\n"


def _hailed(source: Path, out: Path, notes: Path, point: int) -> int:
    parent = os.getpid()

    def fault(count: int, operation: str, path: Path) -> None:
        if count == point and os.fork() == 0:
            for _ in range(500):
                try:
                    os.kill(parent, signal.SIGINT)
                except ProcessLookupError:
                    break
                time.sleep(0.0005)
            os._exit(0)
        if count == point:
            time.sleep(crash.LONGEST)  # the first of them ends this

    crash._watch(crash.Seen(), fault)
    return _as_a_process("export", str(source), str(out), "--quantize", "int4")


def start(*arguments: str) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "exaone_export", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a file is there, which the process is about to make."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def test_f06_f08_f10_the_real_command(source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A second export of the same folder ends at once and names the first, which then is ended, and leaves nothing."""
    out = tmp_path / "deep" / "out"
    for number in (signal.SIGINT, signal.SIGTERM):
        first = start("export", str(source), str(out))
        request.addfinalizer(first.kill)
        wait_for(out.with_name(".out.export-lock"), first)
        if number == signal.SIGINT:
            first.send_signal(signal.SIGSTOP)  # it is not to be done before the other one speaks
            second = start("export", str(source), str(out))
            answer = second.communicate()[1]
            first.send_signal(signal.SIGCONT)
            assert second.returncode == 8
            assert answer == (
                f"error: cannot write bundle: out: process {first.pid} exports to it right now. "
                "Wait until it is done, or choose another folder.\n"
            )
        first.send_signal(number)
        errors = first.communicate()[1]
        assert (first.returncode, errors) == (
            CODES[number],
            f"error: interrupted: {number.name}: stopped on request.\n",
        )
        assert not (tmp_path / "deep").exists()


def test_f23_nobody_reads_the_answer(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`| head` has gone when the answer comes: no traceback, and the bundle is whole."""

    def without_reader() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
        os._exit(_as_a_process("export", str(source), str(tmp_path / "out"), "--quantize", "int4", "-q"))

    status, _ = child(without_reader, tmp_path / "notes")
    assert os.waitstatus_to_exitcode(status) == failures.BROKEN_PIPE
    assert capfd.readouterr().err == ""
    assert cli.main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert beside(tmp_path / "out") == []
