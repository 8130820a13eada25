"""Talk with a model in the terminal; every turn costs its own tokens only.

Lines are typed, or come from a pipe; answers go to stdout, reasoning and everything else to stderr. Ctrl-C stops an
answer, and what was said until then stays. /help lists the commands: images and videos, saving and loading.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from exaone_export import flags
from exaone_export.progress import choose_progress
from model.errors import UsageError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle to run")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    parser.add_argument("--tools", metavar="FILE.json", help="functions the model may call: a list of descriptions")
    parser.add_argument("--thinking", choices=("on", "off"), help="reason before answering (default: the template's)")
    parser.add_argument("--load", metavar="FILE", help="go on with a conversation that /save kept")
    # What `flags.option_changes` asks about, and a chat reads otherwise.
    parser.set_defaults(prompt=None, messages=None)
    flags.add_media_flags(parser)
    flags.add_option_flags(parser)
    flags.add_engine_flags(parser)


def run(arguments: Namespace) -> int:
    """Talk."""
    from exaone_export.commands.chat_input import interrupted_by, piped_lines, typed_lines
    from exaone_export.commands.chat_loop import HELP, Chat, tell
    from runtime.engine import Engine

    if arguments.load and (arguments.system is not None or arguments.tools):
        why = "the conversation in the file has its own system text and tools"
        raise UsageError("bad option", "--load", why, "Leave --system and --tools out")
    settings = flags.option_changes(arguments) | {"preset": arguments.preset}
    tools = flags.read_json_list(arguments.tools) if arguments.tools else None
    progress = choose_progress(wanted=not arguments.quiet)
    interactive = sys.stdin is not None and sys.stdin.isatty() and arguments.stdout.isatty()
    execution = flags.execution_of(arguments)
    with Engine.load(arguments.bundle, arguments.ep, arguments.threads, progress, execution) as engine:
        session = engine.session(arguments.system, tools)
        # Before the first line, so that it waits for nothing but its own tokens.
        engine.graphs.open(images=False)
        if arguments.load:
            session.load(arguments.load)
        chat = Chat(session, settings, arguments.stdout, interactive)
        if not interactive:
            chat.run(piped_lines())
            return 0
        if not arguments.quiet:
            tell(f"{engine.graphs.folder.resolve().name} on {engine.ep}; /help lists commands, Ctrl-D leaves")
        # Between prompt and answer there is nothing to stop, and the chat is not ended by it.
        with interrupted_by(lambda number, frame: None):
            chat.run(typed_lines(arguments.stdout, [usage.partition(" ")[0] for usage in HELP], tell))
    return 0
