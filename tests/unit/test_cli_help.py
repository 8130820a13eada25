"""The command line's surface: every command and flag of the contract, help that is quick, refusals that read well."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys

import pytest

from exaone_export import cli

FLAGS = {
    "demo": ["--json"],
    "export": ["--quantize", "--dtype", "--target", "--task", "--revision", "--force", "--calibration", "--json"],
    "quantize": ["--quantize", "--json"],
    "verify": ["--source", "--prompts", "--json"],
    "inspect": ["--context", "--json"],
    "doctor": ["--ep", "--json"],
    "batch": ["--batch-size", "--force", "--greedy", "--max-new-tokens", "--ep", "--json"],
    "generate": [
        "--image", "--system", "--messages", "--thinking", "--preset", "--greedy", "--temperature", "--top-p",
        "--top-k", "--min-p", "--presence-penalty", "--repetition-penalty", "--seed", "--stop", "--max-new-tokens",
        "--ep", "--threads", "--dry-run", "--json",
    ],
}  # fmt: skip


def _help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main([*argv, "--help"]) == 0
    return capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    assert all(f"    {name} " in text for name in FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_each_command_lists_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys, command)
    assert [flag for flag in FLAGS[command] if flag not in text] == []


@pytest.mark.parametrize("command", FLAGS)
def test_the_docstring_is_the_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = next(module for module in cli.COMMANDS if module.__name__.endswith(f".{command}"))
    summary = (module.__doc__ or "").partition("\n")[0]
    assert summary.endswith(".")
    assert " ".join(summary.split()) in " ".join(_help(capsys, command).split())


def test_help_is_quick() -> None:
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-m", "exaone_export", "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0
    taken = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start
    assert taken < 1  # of the processor, which other programs do not lengthen; about 0.1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("exaone-export 0.")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["export"],
        ["export", "only-source"],
        ["export", "a", "b", "--dtype", "fp8"],
        ["export", "a", "b", "--quant", "int4"],  # no abbreviations: later flags may want the name
        ["inspect", "a", "--context", "0"],
        ["generate", "a", "hello", "--temperature", "warm"],
        ["generate", "a", "hello", "--thinking", "maybe"],
        ["generate", "a", "hello", "--preset", "poem"],
        ["generate", "a", "hello", "-q", "-v"],
    ],
)
def test_wrong_arguments_exit_2_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: wrong arguments: exaone-export")
    assert len(captured.err.splitlines()) <= 3
    assert "Traceback" not in captured.err


def test_a_closed_pipe_is_quiet() -> None:
    program = f"{shlex.quote(sys.executable)} -m exaone_export generate --help | head -n 1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
