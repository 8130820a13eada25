"""From command-line flags to what the runtime is asked: the conversation and the options of its generation."""

from __future__ import annotations

import json
import sys
from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.errors import UsageError

if TYPE_CHECKING:
    from runtime.execution import Execution
    from runtime.messages import Message

PRESETS = ("auto", "general", "document", "text", "reasoning", "none")
# Flag (as argparse names it) → option of runtime.options.GenerationOptions.
_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed", "max_new_tokens",
    "regex", "logprobs", "min_pixels", "max_pixels", "max_total_pixels", "fps", "num_frames",
    "speculate", "draft_tokens",
)  # fmt: skip
_LARGEST_FILE = 64 << 20
_WHAT = "cannot read input"


def add_prompt_flags(parser: ArgumentParser) -> None:
    """Add what the model is told: prompt, images, videos, system text, earlier turns, tools."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to say to the model; - reads it from stdin")
    parser.set_defaults(media=[])
    parser.add_argument(
        "--image", metavar="PATH", action=_Medium, dest="media", help="an image before the prompt; may be repeated"
    )
    parser.add_argument(
        "--video",
        metavar="PATH",
        action=_Medium,
        dest="media",
        help="a video file, or a folder of frames, before the prompt; may be repeated",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the whole conversation")
    parser.add_argument("--messages", metavar="FILE.json", help="earlier turns: a list of {role, content}")
    parser.add_argument("--tools", metavar="FILE.json", help="functions the model may call: a list of descriptions")
    parser.add_argument("--thinking", choices=("on", "off"), help="reason before answering (default: the template's)")


def add_media_flags(parser: ArgumentParser) -> None:
    """Add how much of images and videos the model sees."""
    group = parser.add_argument_group("images and videos", "without these the model's own preprocessing holds")
    group.add_argument("--min-pixels", metavar="N", type=int, help="scale smaller images and frames up to so many")
    group.add_argument("--max-pixels", metavar="N", type=int, help="scale larger images and frames down to so many")
    group.add_argument("--max-total-pixels", metavar="N", type=int, help="refuse more in all, after scaling")
    group.add_argument("--fps", metavar="X", type=float, help="frames to take of a video, a second")
    group.add_argument("--num-frames", metavar="N", type=int, help="frames to take of a video, in all")


class _Medium(Action):
    """Appends a path and its kind to what was given so far: order counts."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*given, (str(option_string).lstrip("-"), values)])


class Conversation(NamedTuple):
    """Checked messages, and the images and videos of their parts, in order."""

    messages: list[Message]
    images: list[str]
    videos: list[str]


def add_option_flags(parser: ArgumentParser) -> None:
    """Add how the answer is drawn, and what form it has."""
    group = parser.add_argument_group(
        "sampling", "without these the bundle's generation_config.json holds, or what the model card advises"
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="auto",
        help="the model card's values for a kind of task; single flags go before them (default: auto, by the input)",
    )
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
    drafts = parser.add_argument_group("drafts", "several tokens with one pass; the answer is that of plain decoding")
    drafts.add_argument(
        "--speculate",
        choices=("auto", "mtp", "lookup", "off"),
        help="draft by the checkpoint's draft head, by what came before, or by what is faster (default: off)",
    )
    drafts.add_argument(
        "--draft-tokens", metavar="K", type=int, help="tokens to draft for a pass (default: as many as pay)"
    )
    form = parser.add_argument_group("form of the answer", "the first three need the extra 'constrained'")
    form.add_argument("--json-schema", metavar="FILE|-", help="answer in JSON that this schema allows")
    form.add_argument("--regex", metavar="REGEX", help="answer with text that this expression matches")
    form.add_argument("--grammar", metavar="FILE|-", help="answer by this grammar, Lark or GBNF")
    form.add_argument("--logprobs", metavar="N", type=int, help="with --json: tokens' log-probabilities, N likeliest")


def add_engine_flags(parser: ArgumentParser) -> None:
    """Add where the graphs run, and with what."""
    group = parser.add_argument_group("execution", "what names a GPU holds for --ep cuda")
    group.add_argument("--ep", default="auto", metavar="auto|cpu|cuda|...", help="execution provider (default: auto)")
    group.add_argument("--threads", metavar="N", type=int, help="threads for one operator (default: all cores)")
    group.add_argument(
        "--ep-option", metavar="NAME=VALUE", action="append", default=[], help="passed on to it; may be repeated"
    )
    group.add_argument("--gpu-layers", metavar="N", type=int, help="layers on the GPU (bundles of export --offload)")
    group.add_argument("--gpu-memory", metavar="SIZE", help="most GPU memory to use, as 20GB; layers are chosen to fit")
    group.add_argument(
        "--cuda-graph", choices=("auto", "on", "off"), default="auto", help="record decoding steps (default: auto)"
    )


def execution_of(arguments: Namespace) -> Execution:
    """What the flags of `add_engine_flags` say beside provider and threads.

    Raises:
        UsageError: a value makes no sense.
    """
    from runtime.execution import Execution, read_ep_options

    options = read_ep_options(arguments.ep_option)
    return Execution(options, arguments.gpu_layers, arguments.gpu_memory, arguments.cuda_graph)


def read_messages(arguments: Namespace) -> Conversation:
    """The conversation: system text, earlier turns, then one user turn with images, videos and the prompt.

    Parts of earlier turns may name their image or video themselves; flags serve those that do not.

    Raises:
        UsageError: there is nothing to answer, or a file or a turn has a fault.
    """
    from runtime.messages import build_messages, take_media

    history = read_json_list(arguments.messages) if arguments.messages else []
    prompt = read_prompt(arguments.prompt)
    if prompt is None and not history and not arguments.media:
        raise UsageError("nothing to answer", "PROMPT", "it is missing", "Give a prompt, or - to read it from stdin")
    paths = {kind: [path for one, path in arguments.media if one == kind] for kind in ("image", "video")}
    if prompt is None and history:
        clean, images, videos = take_media(history, paths["image"], paths["video"])
        return Conversation(build_messages(None, system=arguments.system, history=clean), images, videos)
    clean, images, videos = take_media(history)
    kinds = [kind for kind, _ in arguments.media]
    messages = build_messages(prompt, system=arguments.system, history=clean, media=kinds)
    return Conversation(messages, images + paths["image"], videos + paths["video"])


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
    remedy = "Give a JSON file with a list"
    try:
        value = json.loads(_read_text(name, remedy))
    except (ValueError, RecursionError) as reason:
        why = str(reason).partition("\n")[0][:200]
        raise UsageError(_WHAT, name, f"it is not JSON ({why})", remedy) from None
    if not isinstance(value, list):
        raise UsageError(_WHAT, name, f"it holds a {type(value).__name__}", remedy)
    return value


def _read_text(name: str, remedy: str) -> str:
    """A file's text, or stdin's for "-"."""
    path = Path(name)
    if name == "-":
        return str(read_prompt(name))
    if not path.is_file():
        raise UsageError(_WHAT, name, "there is no such file", remedy)
    if path.stat().st_size > _LARGEST_FILE:
        raise UsageError(_WHAT, name, f"it is larger than {_LARGEST_FILE} bytes", remedy)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(_WHAT, name, "it is not UTF-8 text", remedy) from None


def option_changes(arguments: Namespace) -> dict[str, Any]:
    """The options that flags set, by their names in `GenerationOptions`; what no flag sets is absent."""
    changes = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    _refuse_two_readers(arguments)
    for name in ("json_schema", "grammar"):
        file = getattr(arguments, name)
        if file is not None:
            changes[name] = _read_text(file, f"Give a file for --{name.replace('_', '-')}, or - for stdin")
    if arguments.stop:
        changes["stop"] = tuple(arguments.stop)
    if arguments.greedy:
        changes["do_sample"] = False
    if arguments.thinking is not None:
        changes["enable_thinking"] = arguments.thinking == "on"
    return changes


def _refuse_two_readers(arguments: Namespace) -> None:
    names = {"PROMPT": "prompt", "--messages": "messages", "--tools": "tools"}
    names |= {"--json-schema": "json_schema", "--grammar": "grammar"}
    readers = [flag for flag, name in names.items() if getattr(arguments, name) == "-"]
    if len(readers) > 1:
        raise UsageError(_WHAT, "-", f"{' and '.join(readers)} cannot both come from stdin", "Give one as a file")
