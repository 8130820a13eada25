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
from typing import NoReturn, TextIO, cast

from exaone_export import __version__, failures, signals
from exaone_export.commands import batch, bench, chat, demo, doctor, export, generate, inspect, push, quantize, verify
from exaone_export.output import Watched, print_json
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command line.

    Raises:
        UsageError: they are wrong.
        SystemExit: help or version was asked for, and is printed.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # An optional argument that stands behind flags is found by newer versions of argparse only.
    if _is_one_argument(rest) and arguments.run is generate.run and arguments.prompt is None:
        arguments.prompt, rest = rest[-1], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _is_one_argument(rest: Sequence[str]) -> bool:
    """Whether this is one argument that argparse takes for no flag: behind "--", or "-", or with a blank in it."""
    if len(rest) == 2:
        return rest[0] == "--"
    return len(rest) == 1 and (not rest[0].startswith("-") or rest[0] == "-" or " " in rest[0])


def add_noise_flags(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --verbose, which every command has."""
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument("-q", "--quiet", action="store_true", help="no progress, no warnings")
    noise.add_argument("-v", "--verbose", action="store_true", help="say what is being done")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; `argv` defaults to the process's arguments."""

    def command() -> int:
        try:
            arguments = parse(argv)
        except SystemExit as stop:  # --help and --version end so
            return int(stop.code or 0)
        return run_command(arguments)

    code = supervise(command, ends_process=argv is None, json=asks_for_json(sys.argv[1:] if argv is None else argv))
    if argv is None and code in signals.EXIT_CODES.values():
        signals.leave(code)
    return code


def asks_for_json(argv: Sequence[str]) -> bool:
    """Whether the flag --json is among the arguments, even where others of them are wrong."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    return "--json" in flags


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


def supervise(command: Callable[[], int], *, ends_process: bool = False, json: bool = False) -> int:
    """Call `command` and turn whatever ends it into an exit code and at most three lines on stderr.

    Args:
        command: returns an exit code.
        ends_process: whether the process ends afterwards; further signals then cannot disturb the end.
        json: whether stdout gets the error as a JSON object, where `command` has not put its own there.
    """
    stdout = _opened("stdout")
    _opened("stderr")
    _print_any_text(stdout)
    watched = Watched(stdout)
    with signals.raised(ends_process=ends_process) as received:
        try:
            with contextlib.redirect_stdout(cast(TextIO, watched)) if json else contextlib.nullcontext():
                code = command()
            stdout.flush()
            return code
        except BrokenPipeError:
            _give_up(stdout)
            return failures.BROKEN_PIPE
        except KeyboardInterrupt:
            # An interrupt that passed through eval or exec (dataclasses use it) leaves a mark in CPython with which it
            # would end the process by the signal instead of our exit code; the next eval takes the mark away.
            eval("None")
            error, code = _interrupted(signal.SIGINT, ignore=ends_process)
        except failures.Terminated:
            error, code = _interrupted(signal.SIGTERM, ignore=ends_process)
        except Exception as failure:  # noqa: BLE001 - the last line of defence: users never see a traceback
            if received.arrived:  # a library made something else of it
                error, code = _interrupted(received.arrived[0], ignore=ends_process)
            else:
                _complain(failures.debug_trace(failure))
                error = failures.explain(failure)
                code = error.exit_code
        _complain(failures.message_lines(error) + "\n")
        if json and not watched.written:
            _answer(error, code, stdout)
        return code


def _interrupted(number: signal.Signals, *, ignore: bool) -> tuple[ExaoneError, int]:
    if ignore:
        signals.ignore()
    return ExaoneError("interrupted", number.name, "stopped on request"), signals.EXIT_CODES[number]


def _complain(text: str) -> None:
    """Writes to stderr; that nobody reads it, or that it is full, changes nothing."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)


def _answer(error: ExaoneError, code: int, stdout: TextIO) -> None:
    """Prints the error for programs; that nobody reads it changes nothing."""
    try:
        print_json({"ok": False, "error": failures.parts(error) | {"exit_code": code}}, stdout)
        stdout.flush()
    except (OSError, ValueError):
        _give_up(stdout)


def _give_up(stdout: TextIO) -> None:
    """The reader (`| head`) has gone; nothing may be flushed into the closed pipe at exit either."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _opened(name: str) -> TextIO:
    """Python has no stdout or stderr where the caller closed it (`>&-`); what is printed then goes nowhere."""
    if getattr(sys, name) is None:
        setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
    stream: TextIO = getattr(sys, name)
    return stream


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


def _print_any_text(stream: TextIO) -> None:
    """Let file names that are not UTF-8, and Korean on an ASCII terminal, print as escapes instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
