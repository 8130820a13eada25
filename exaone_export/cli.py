"""The `exaone-export` command: choose a subcommand, run it, turn failures into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from exaone_export import __version__, failures, signals
from exaone_export.commands import batch, bench, chat, demo, doctor, export, generate, inspect, push, quantize, verify
from model.errors import ExaoneError, UsageError

DESCRIPTION = "Export EXAONE checkpoints to ONNX, quantize them, and run them with ONNX Runtime."
COMMANDS = (demo, export, quantize, verify, inspect, generate, chat, batch, bench, push, doctor)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose refusals are our errors, so that they read and exit like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError("wrong arguments", self.prog, message, f"See {self.prog} --help")


def build_parser() -> Parser:
    """The parser with every subcommand; `run` of the parsed arguments is the command's function."""
    parser = Parser(prog="exaone-export", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        description = (module.__doc__ or "").strip()
        summary = description.partition("\n")[0]
        name = module.__name__.rpartition(".")[2]
        # Abbreviated flags would take names that later commands need.
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        module.add_arguments(command)
        add_noise_flags(command)
        command.set_defaults(run=module.run)
    return parser


def add_noise_flags(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which every command has."""
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("-q", "--quiet", action="store_true", help="no progress, no warnings")
    noise.add_argument("-v", "--verbose", action="store_true", help="say what is being done")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `argv` defaults to the process's arguments."""

    def command() -> int:
        try:
            arguments = build_parser().parse_args(argv)
        except SystemExit as stop:  # --help and --version end so
            return int(stop.code or 0)
        return run_command(arguments)

    code = supervise(command, ends_process=argv is None)
    if argv is None and code in signals.EXIT_CODES.values():
        signals.leave(code)
    return code


def run_command(arguments: argparse.Namespace) -> int:
    """Run a parsed command; its `stdout` argument is where the answer goes, everything else goes to stderr."""
    _set_up_logging(quiet=arguments.quiet, verbose=arguments.verbose)
    arguments.stdout = sys.stdout
    # Libraries chatter on stdout and warn about their own ageing; the answer must stand alone.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        if not arguments.verbose:
            warnings.simplefilter("ignore")
        code: int = arguments.run(arguments)
    return code


def supervise(command: Callable[[], int], *, ends_process: bool = False) -> int:
    """Call `command` and turn whatever ends it into an exit code and at most three lines on stderr.

    Args:
        command: returns an exit code.
        ends_process: whether the process ends afterwards; further signals then cannot disturb the end.
    """
    stdout = _opened_stdout()
    _print_any_text(stdout)
    with signals.raised(ends_process=ends_process) as received:
        try:
            code = command()
            stdout.flush()
            return code
        except BrokenPipeError:
            # The reader (`| head`) has gone; nothing may be flushed into the closed pipe at exit either.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
            return failures.BROKEN_PIPE
        except KeyboardInterrupt:
            # An interrupt that passed through eval or exec (dataclasses use it) leaves a mark in CPython with which it
            # would end the process by the signal instead of our exit code; the next eval takes the mark away.
            eval("None")
            return _interrupted(signal.SIGINT, ignore=ends_process)
        except failures.Terminated:
            return _interrupted(signal.SIGTERM, ignore=ends_process)
        except Exception as failure:  # noqa: BLE001 - the last line of defence: users never see a traceback
            if received.arrived:  # a library made something else of it
                return _interrupted(received.arrived[0], ignore=ends_process)
            sys.stderr.write(failures.debug_trace(failure))
            error = failures.explain(failure)
            return _report(error, error.exit_code)


def _interrupted(number: signal.Signals, *, ignore: bool) -> int:
    if ignore:
        signals.ignore()
    return _report(ExaoneError("interrupted", number.name, "stopped on request"), signals.EXIT_CODES[number])


def _opened_stdout() -> TextIO:
    """Python has no stdout where the caller closed it (`>&-`); what is printed then goes nowhere."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the whole process
    return sys.stdout


def _set_up_logging(*, quiet: bool, verbose: bool) -> None:
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(_LevelFormatter())
    logger = logging.getLogger("exaone_export")
    logger.handlers[:] = [handler]
    logger.setLevel(level)


class _LevelFormatter(logging.Formatter):
    """`warning: text` for warnings and worse, plain text for information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _report(error: ExaoneError, code: int) -> int:
    print(failures.message_lines(error), file=sys.stderr)  # noqa: T201 - this is the command line
    return code


def _print_any_text(stream: TextIO) -> None:
    """Let file names that are not UTF-8, and Korean on an ASCII terminal, print as escapes instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
