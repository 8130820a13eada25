"""The process that renders a chat template; `runtime.template` starts it and talks to it.

It is run as a script, isolated from the user's site and environment: ``template_child.py MEMORY_BYTES FOLDER...``
with the folders that hold jinja2 and markupsafe. A frame is eight bytes of length, big-endian, and that much JSON. It
first writes ``{"ready": true}``, then answers each ``{"template", "variables"}`` with ``{"text"}`` or ``{"error",
"message"}``, where error is "raised" (the template called raise_exception), "template" or "memory". It ends when its
input ends.
"""

from __future__ import annotations

import datetime
import json
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

MAX_OUTPUT_CHARACTERS: Final = 2**25
_CPU_SECONDS: Final = 5  # more than the parent's limit: it only ends a child whose parent was killed
_LENGTH_BYTES: Final = 8


class TemplateRaisedError(Exception):
    """The template refused its input by calling raise_exception."""


def read_frame(stream: BinaryIO) -> Any:
    """The next JSON value.

    Raises:
        EOFError: the stream ended.
    """
    length = int.from_bytes(_read_exactly(stream, _LENGTH_BYTES), "big")
    return json.loads(_read_exactly(stream, length))


def encode_frame(value: Any) -> bytes:
    """One JSON value as it travels."""
    data = json.dumps(value).encode("ascii")
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def write_frame(stream: BinaryIO, frame: bytes) -> None:
    """Writes what `encode_frame` made."""
    stream.write(frame)
    stream.flush()


def make_environment() -> Any:
    """A sandboxed jinja2 environment with what transformers gives to chat templates."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it only renders its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _make_dict  # the type itself would hand out its methods
    environment.globals.pop("lipsum", None)
    return environment


def render(environment: Any, source: str, variables: dict[str, Any]) -> dict[str, Any]:
    """One answer frame."""
    from jinja2.exceptions import TemplateError

    try:
        text = _compiled(environment, source).render(**variables)
    except TemplateRaisedError as error:
        return {"error": "raised", "message": str(error)}
    except MemoryError:
        return {"error": "memory", "message": "out of memory"}
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        NameError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        return {"error": "template", "message": f"{type(error).__name__}: {error}"}
    if len(text) > MAX_OUTPUT_CHARACTERS:
        return {"error": "memory", "message": f"the text has {len(text)} characters"}
    return {"text": text}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are none left, or memory ran out."""
    environment = make_environment()
    write_frame(answers, encode_frame({"ready": True}))
    while True:
        try:
            request = read_frame(requests)
            _limit_cpu()
            answer = render(environment, request["template"], request["variables"])
        except EOFError:
            return
        except MemoryError:
            answer = {"error": "memory", "message": "out of memory"}
        write_frame(answers, encode_frame(answer))
        if answer.get("error") == "memory":
            return  # the heap may be in any state; the parent starts a fresh process


def _compiled(environment: Any, source: str) -> Any:
    cached: dict[str, Any] = environment.__dict__.setdefault("exaone_compiled", {})
    if source not in cached:
        cached.clear()
        cached[source] = environment.from_string(source)
    return cached[source]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML and sorts keys; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRaisedError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _make_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def limit_memory(allowance: int) -> None:
    """Limits the address space to what is in use now plus `allowance`; a no-op where the system has no such limit."""
    statm = Path("/proc/self/statm")
    if sys.platform == "win32" or not statm.exists():
        return
    import resource

    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + allowance
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_cpu() -> None:
    """Allows this much more processor time from now on."""
    if sys.platform == "win32":
        return
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + _CPU_SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main(arguments: list[str]) -> None:
    """Runs the process; see the module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; the child ends with its input
    sys.path += arguments[1:]
    make_environment()  # imports happen before the limit
    limit_memory(int(arguments[0]))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main(sys.argv[1:])
