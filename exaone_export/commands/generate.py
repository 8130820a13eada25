"""Answer a prompt, with images and videos if given, and print the answer as it comes.

The answer goes to stdout, tool calls after it, each as a line of JSON; reasoning, where the model shows it, goes to
stderr. Images and videos come before the prompt text, in the order given. Without --thinking, the chat template's own
default holds.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from exaone_export import flags
from exaone_export.output import harmless, print_json
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
    flags.add_media_flags(parser)
    flags.add_option_flags(parser)
    flags.add_engine_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="render and tokenize only; nothing is run")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, at the end")


def run(arguments: Namespace) -> int:
    """Generate, and print."""
    from runtime.engine import Engine

    changes = flags.option_changes(arguments)
    talk = flags.read_messages(arguments)
    tools = flags.read_json_list(arguments.tools) if arguments.tools else None
    progress = choose_progress(wanted=not (arguments.quiet or arguments.json))
    execution = flags.execution_of(arguments)
    with Engine.load(arguments.bundle, arguments.ep, arguments.threads, progress, execution) as engine:
        preset, options = engine.choose_options(
            talk.messages, [*talk.images, *talk.videos], preset=arguments.preset, **changes
        )
        if arguments.dry_run:
            _print_prompt(engine, talk, tools, options, arguments)
            return 0
        if preset is not None:
            log.info("drawing as the model card advises: %s", preset)
        chunks = engine.stream(talk.messages, talk.images, videos=talk.videos, tools=tools, options=options)
        result = _follow(chunks, None if arguments.json else arguments.stdout)
    if arguments.json:
        print_json(result.to_dict(), arguments.stdout)
    for warning in result.warnings:
        log.warning("%s", warning)
    times = result.timings
    log.info("%s: loaded in %.2f s, image %.2f s, prompt %.2f s (%d tokens), answer %.2f s (%.1f tokens/s)",
             result.ep, times.load_s, times.vision_s, times.prefill_s, result.prompt_tokens, times.decode_s,
             times.decode_tokens_per_s)  # fmt: skip
    return 0


def _print_prompt(
    engine: Engine,
    talk: flags.Conversation,
    tools: list[Message] | None,
    options: GenerationOptions,
    arguments: Namespace,
) -> None:
    prompt = engine.prompt(
        talk.messages,
        talk.images,
        videos=talk.videos,
        tools=tools,
        enable_thinking=options.enable_thinking,
        options=options,
    )
    if arguments.json:
        found = {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids, "options": options}
        print_json(found, arguments.stdout)
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
            if stdout is not None:
                _print_end(chunk.result, last, stdout)
            return chunk.result
    raise RuntimeError("the stream ended without a result")


def _print_end(result: Result, last: str, stdout: TextIO) -> None:
    """Ends the text's last line; tool calls follow, each as one line of JSON."""
    if not last.endswith("\n") and (last or not result.tool_calls):
        print(file=stdout)
    for call in result.tool_calls:
        print_json(call, stdout)


def _print_piece(chunk: Chunk, stdout: TextIO) -> None:
    if chunk.kind == "text":
        stdout.write(harmless(chunk.text) if stdout.isatty() else chunk.text)
        stdout.flush()
        return
    if sys.stderr.isatty():
        sys.stderr.write(f"{DIM}{harmless(chunk.text)}{PLAIN}")
    else:
        sys.stderr.write(chunk.text)
    sys.stderr.flush()
