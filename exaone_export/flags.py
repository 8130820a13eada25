"""From command-line flags to what the runtime is asked: the conversation and the options of its generation."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UsageError

if TYPE_CHECKING:
    from runtime.messages import Message

PRESETS = ("general", "document", "text")
# Flag (as argparse names it) → option of runtime.options.GenerationOptions.
_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed", "max_new_tokens",
)  # fmt: skip
_LARGEST_FILE = 64 << 20
_WHAT = "cannot read input"


def add_prompt_flags(parser: ArgumentParser) -> None:
    """Add what the model is told: prompt, images, system text, earlier turns, tools."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to say to the model; - reads it from stdin")
    parser.add_argument(
        "--image", metavar="PATH", action="append", default=[], help="an image before the prompt; may be repeated"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    parser.add_argument("--messages", metavar="FILE.json", help="earlier turns: a list of {role, content}")
    parser.add_argument("--tools", metavar="FILE.json", help="functions the model may call: a list of descriptions")
    parser.add_argument("--thinking", choices=("on", "off"), help="reason before answering (default: the template's)")


def add_option_flags(parser: ArgumentParser) -> None:
    """Add how the answer is drawn; without them the bundle's generation_config.json holds."""
    group = parser.add_argument_group("sampling", "without these, the bundle's generation_config.json holds")
    group.add_argument("--preset", choices=PRESETS, help="the model card's advice for a kind of task")
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument("--temperature", metavar="X", type=float, help="divides the logits; 0 is greedy")
    group.add_argument("--top-p", metavar="X", type=float, help="keep the likeliest tokens up to this probability")
    group.add_argument("--top-k", metavar="N", type=int, help="keep this many likeliest tokens; 0 is all")
    group.add_argument("--min-p", metavar="X", type=float, help="keep tokens this times as likely as the likeliest")
    group.add_argument("--presence-penalty", metavar="X", type=float, help="subtracted for tokens generated before")
    group.add_argument("--repetition-penalty", metavar="X", type=float, help="divides for tokens seen before; 1 is off")
    group.add_argument("--seed", metavar="N", type=int, help="the same seed gives the same answer")
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer here; may be repeated"
    )
    group.add_argument("--max-new-tokens", metavar="N", type=int, help="most tokens to generate")


def add_engine_flags(parser: ArgumentParser) -> None:
    """Add where the graphs run."""
    group = parser.add_argument_group("execution")
    group.add_argument("--ep", default="auto", metavar="auto|cpu|cuda|...", help="execution provider (default: auto)")
    group.add_argument("--threads", metavar="N", type=int, help="threads for one operator (default: all cores)")


def read_messages(arguments: Namespace) -> list[Message]:
    """The conversation: system text, earlier turns, then one user turn with the images and the prompt.

    Raises:
        UsageError: there is nothing to answer, or a file or a turn has a fault.
    """
    from runtime.messages import build_messages

    history = read_json_list(arguments.messages) if arguments.messages else []
    prompt = read_prompt(arguments.prompt)
    if prompt is None and not history and not arguments.image:
        raise UsageError("nothing to answer", "PROMPT", "it is missing", "Give a prompt, or - to read it from stdin")
    if prompt is None and history:
        # The images belong to the placeholders that the turns have.
        return build_messages(None, system=arguments.system, history=history)
    return build_messages(prompt, images=len(arguments.image), system=arguments.system, history=history)


def read_prompt(argument: str | None) -> str | None:
    """The prompt itself, or what stdin holds for "-".

    Raises:
        UsageError: stdin is not UTF-8 text.
    """
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read(_LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(_WHAT, "stdin", "it is not UTF-8 text", "Pipe plain text") from None


def read_json_list(name: str) -> list[Any]:
    """The list that a JSON file holds.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    path = Path(name)
    remedy = "Give a JSON file with a list"
    if not path.is_file():
        raise UsageError(_WHAT, name, "there is no such file", remedy)
    if path.stat().st_size > _LARGEST_FILE:
        raise UsageError(_WHAT, name, f"it is larger than {_LARGEST_FILE} bytes", remedy)
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as reason:
        why = str(reason).partition("\n")[0][:200]
        raise UsageError(_WHAT, name, f"it is not JSON ({why})", remedy) from None
    if not isinstance(value, list):
        raise UsageError(_WHAT, name, f"it holds a {type(value).__name__}", remedy)
    return value


def option_changes(arguments: Namespace) -> dict[str, Any]:
    """The options that flags set, by their names in `GenerationOptions`; what no flag sets is absent."""
    changes = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    if arguments.stop:
        changes["stop"] = tuple(arguments.stop)
    if arguments.greedy:
        changes["do_sample"] = False
    if arguments.thinking is not None:
        changes["enable_thinking"] = arguments.thinking == "on"
    return changes
