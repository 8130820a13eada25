"""Answer a prompt, with images if given, and print the answer as it comes.

The answer goes to stdout; reasoning, where the model shows it, goes to stderr. Images come before the prompt text, in
the order given. Without --thinking, the chat template's own default holds.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from exaone_export import flags
from exaone_export.output import print_json
from exaone_export.progress import choose_progress

if TYPE_CHECKING:
    from runtime.engine import Chunk, Engine, Result
    from runtime.messages import Message
    from runtime.options import GenerationOptions

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
log = logging.getLogger("exaone_export.cli")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to run")
    flags.add_prompt_flags(parser)
    flags.add_option_flags(parser)
    flags.add_engine_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="render and tokenize only; nothing is run")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, at the end")


def run(arguments: Namespace) -> int:
    """Generate, and print."""
    from runtime.engine import Engine

    messages = flags.read_messages(arguments)
    tools = flags.read_json_list(arguments.tools) if arguments.tools else None
    progress = choose_progress(wanted=not (arguments.quiet or arguments.json))
    with Engine.load(arguments.bundle, arguments.ep, arguments.threads, progress) as engine:
        if arguments.dry_run:
            _print_prompt(engine, messages, tools, arguments)
            return 0
        chunks = engine.stream(
            messages,
            arguments.image,
            tools=tools,
            options=_base_options(engine, arguments.preset),
            **flags.option_changes(arguments),
        )
        result = _follow(chunks, None if arguments.json else arguments.stdout)
    if arguments.json:
        print_json(result, arguments.stdout)
    times = result.timings
    log.info("%s: loaded in %.2f s, image %.2f s, prompt %.2f s (%d tokens), answer %.2f s (%.1f tokens/s)",
             result.ep, times.load_s, times.vision_s, times.prefill_s, result.prompt_tokens, times.decode_s,
             times.decode_tokens_per_s)  # fmt: skip
    return 0


def _base_options(engine: Engine, preset: str | None) -> GenerationOptions:
    """What flags are applied to: a preset, or what the bundle's generation_config.json says."""
    from runtime.options import PRESETS

    return engine.defaults if preset is None else PRESETS[preset]


def _print_prompt(engine: Engine, messages: list[Message], tools: list[Message] | None, arguments: Namespace) -> None:
    thinking = flags.option_changes(arguments).get("enable_thinking")
    prompt = engine.prompt(messages, arguments.image, tools=tools, enable_thinking=thinking)
    if arguments.json:
        print_json({"prompt": prompt.text, "prompt_token_ids": prompt.token_ids}, arguments.stdout)
    else:
        print(prompt.text, file=arguments.stdout)


def _follow(chunks: Iterator[Chunk], stdout: TextIO | None) -> Result:
    """The result at the stream's end; on the way, prints to `stdout` (None: nothing) and reasoning to stderr."""
    last = ""
    for chunk in chunks:
        if stdout is not None and chunk.text:
            _print_piece(chunk, stdout)
            last = chunk.text if chunk.kind == "text" else last
        if chunk.result is not None:
            if stdout is not None and not last.endswith("\n"):
                print(file=stdout)
            return chunk.result
    raise RuntimeError("the stream ended without a result")


def _print_piece(chunk: Chunk, stdout: TextIO) -> None:
    if chunk.kind == "text":
        stdout.write(chunk.text)
        stdout.flush()
        return
    dim, plain = (DIM, PLAIN) if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{dim}{chunk.text}{plain}")
    sys.stderr.flush()
