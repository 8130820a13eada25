"""Answer a file of requests, several side by side, and write their answers in order.

IN.jsonl has a request on each line: {"id", "prompt" or "messages", "images", "videos", "system", "tools", "preset"} and
options by name (max_new_tokens, temperature, ...), which go before the flags; paths are relative to the file. Lines of
OpenAI's batch files do as well. OUT.jsonl gets a line for each, with its answer or its error. A run that was
interrupted goes on when the same command is given again. The exit code is 0 when every request has an answer, else
that of the first one without.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from exaone_export import flags
from exaone_export.output import print_json
from exaone_export.progress import choose_progress


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to run")
    parser.add_argument("source", metavar="IN.jsonl", help="a request on each line")
    parser.add_argument("out", metavar="OUT.jsonl", help="the file to make")
    parser.add_argument(
        "--batch-size",
        metavar="N|auto",
        type=_size,
        help="requests answered side by side (default: auto, 8 or as many as there is memory for)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT.jsonl, or begin anew what was begun otherwise"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for lines without their own")
    parser.add_argument(
        "--tools", metavar="FILE.json", help="functions the model may call, for lines without their own"
    )
    parser.add_argument("--thinking", choices=("on", "off"), help="reason before answering (default: the template's)")
    parser.set_defaults(prompt=None, messages=None)
    flags.add_media_flags(parser)
    flags.add_option_flags(parser)
    flags.add_engine_flags(parser)
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def run(arguments: Namespace) -> int:
    """Answer, and say how it went."""
    from exaone_export.batching.report import first_fault
    from exaone_export.batching.run import Place, Settings, run_batch

    changes = flags.option_changes(arguments)
    tools = flags.read_json_list(arguments.tools) if arguments.tools else None
    settings = Settings(changes, arguments.preset, arguments.system, tools, arguments.batch_size)
    place = Place(arguments.ep, arguments.threads, flags.execution_of(arguments))
    out = Path(arguments.out)
    progress = choose_progress(wanted=not (arguments.quiet or arguments.json))
    report = run_batch(
        Path(arguments.bundle), Path(arguments.source), out, settings, place, force=arguments.force, progress=progress
    )
    if arguments.json:
        print_json(report, arguments.stdout)
    else:
        earlier = f", {report.resumed} of them earlier" if report.resumed else ""
        line = f"{report.answered} of {report.requests} requests answered{earlier}: {report.new_tokens} tokens"
        if report.batch_size is not None:
            line += f", {report.new_tokens_per_s:.1f} a second, {report.batch_size} requests side by side"
        print(f"{line}; {out.name}", file=arguments.stdout)
    fault = first_fault(report, out)
    if fault is not None:
        raise fault
    return 0


def _size(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()) or not 0 < len(text) <= 4 or int(text) < 1:
        raise ArgumentTypeError(f"{text[:40]!r} is neither auto nor a whole number from 1 to 9999")
    return int(text)
