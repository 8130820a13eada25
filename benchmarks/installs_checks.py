"""What `benchmarks.installs` tries in an environment: everything by the installed commands, in a foreign folder."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.installs_envs import Environment, Wrong
from exaone_export.demo import Sample, checkpoint_folder, samples

ROOMS = ("exaone_export", "exporter", "model", "quantize", "runtime")
HELP_LIMIT_S = 0.3
# What a machine that only runs bundles shall not need.
HEAVY = ("onnx", "onnx-ir", "onnxscript", "optimum", "safetensors", "torch", "transformers")
_OWNERS = """
import importlib.metadata as metadata, json
owners = metadata.packages_distributions()
names = {item.metadata["Name"].lower().replace("_", "-") for item in metadata.distributions()}
ours = [str(file) for file in metadata.files("exaone-export")]
print(json.dumps({"owners": {room: owners.get(room) for room in ROOMS}, "names": sorted(names), "files": ours}))
"""


class Installed:
    """The commands of one environment, run in a folder of somebody else's.

    Args:
        folder: the environment.
        scratch: where they run; it gets folders named like ours, as people have them.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.bin = folder / "bin"
        self.scratch = scratch
        for name in ("model/weights", "runtime", "home"):
            (scratch / name).mkdir(parents=True, exist_ok=True)
        kept = {key: os.environ[key] for key in ("LANG", "OMP_NUM_THREADS") if key in os.environ}
        self.environment = {**kept, "PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(scratch / "home")}

    def run(self, *command: str, code: int = 0, stdin: str = "") -> tuple[str, str]:
        """Standard output and error of a command that has to end with `code`."""
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            capture_output=True, text=True, cwd=self.scratch, env=self.environment, input=stdin, timeout=540,
        )  # fmt: skip
        if done.returncode != code or "Traceback" in done.stderr:
            raise Wrong(
                f"{' '.join(command[:3])} ended with {done.returncode}: {done.stdout[-300:]}{done.stderr[-900:]}"
            )
        return done.stdout, done.stderr

    def json(self, *command: str) -> Any:
        """What a command of ours prints as JSON."""
        return json.loads(self.run("exaone-export", *command, "--json")[0])


def check(folder: Path, environment: Environment, bundle: Path, scratch: Path) -> dict[str, Any]:
    """Tries everything; returns the figures.

    Raises:
        Wrong: something is not as promised.
    """
    installed = Installed(folder, scratch)
    installed.run("python", "-m", "pip", "--disable-pip-version-check", "check")
    runtime = check_distributions(installed, environment)
    row: dict[str, Any] = {"onnxruntime": runtime, "help_ms": round(1000 * slowest_help(installed))}
    check_running(installed, bundle)
    if "video" in environment.extras:
        check_extras(installed, bundle)
    row["export"] = check_export(installed) if environment.exports else check_no_export(installed)
    return row


def check_distributions(installed: Installed, environment: Environment) -> str:
    """Names that are ours alone, nothing heavy without `export`, no tests; returns onnxruntime's version."""
    program = f"ROOMS = {ROOMS!r}\n{_OWNERS}"
    found = json.loads(installed.run("python", "-I", "-c", program)[0])
    foreign = {room: names for room, names in found["owners"].items() if set(names or ()) != {"exaone-export"}}
    if foreign:
        raise Wrong(f"names of ours that are not ours alone: {foreign}")
    heavy = sorted(set(HEAVY) & set(found["names"]))
    if heavy and not environment.exports:
        raise Wrong(f"installed without being needed: {heavy}")
    strange = [name for name in found["files"] if name.startswith(("tests/", "benchmarks/", "training/"))]
    if strange:
        raise Wrong(f"installed without belonging there: {strange[:3]}")
    for command in ("exaone-export", "python"):
        arguments = ["-m", "exaone_export"] if command == "python" else []
        if installed.run(command, *arguments, "--version")[0].split()[-1] != version("exaone-export"):
            raise Wrong(f"{command} says another version")
    return installed.run("python", "-c", "import importlib.metadata as m; print(m.version('onnxruntime'))")[0].strip()


def slowest_help(installed: Installed) -> float:
    """Seconds of the slowest command's `--help`, the best of five each."""
    text = installed.run("exaone-export", "--help")[0]
    commands = [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "]
    if len(commands) < 10:
        raise Wrong(f"--help lists {commands}")
    times = {}
    for command in ([], *([name] for name in commands)):
        times[" ".join(command)] = min(_seconds(installed, [*command, "--help"]) for _ in range(5))
    name = max(times, key=lambda name: times[name])
    if times[name] > HELP_LIMIT_S:
        raise Wrong(f"{name} --help takes {times[name]:.2f} s")
    return times[name]


def _seconds(installed: Installed, arguments: Sequence[str]) -> float:
    start = time.perf_counter()
    installed.run("exaone-export", *arguments)
    return time.perf_counter() - start


def check_running(installed: Installed, bundle: Path) -> None:
    """Generate, verify, inspect, batch, chat and doctor on a bundle of the demonstration checkpoint."""
    where = str(bundle)
    sample = next(sample for sample in samples() if sample.task == "line")
    check_answer(installed, bundle, sample)
    for result, key in ((installed.json("verify", where), "ok"), (installed.json("doctor"), "ok")):
        if result[key] is not True:
            raise Wrong(f"not ok: {json.dumps(result)[:600]}")
    if installed.json("inspect", where)["model_type"] != "exaone4_5":
        raise Wrong("inspect names another model")
    line = {"id": "a", "prompt": sample.prompt, "images": [str(path) for path in sample.paths]}
    (installed.scratch / "in.jsonl").write_text(json.dumps(line) + "\n")
    installed.run(
        "exaone-export", "batch", where, "in.jsonl", "out.jsonl", "--greedy", "--thinking", "off", "-q", "--force"
    )
    answer = (installed.scratch / "out.jsonl").read_text()
    if sample.text not in answer:
        raise Wrong(f"batch answers {answer[:300]}")
    installed.run("exaone-export", "chat", where, "-q", stdin="Hello\n")


def check_answer(installed: Installed, bundle: Path, sample: Sample) -> None:
    """The bundle reads an image, by the console script and by `python -m`."""
    images = [word for path in sample.paths for word in ("--image", str(path))]
    command = [
        "generate",
        str(bundle),
        sample.prompt,
        *images,
        "--greedy",
        "--thinking",
        "off",
        "--max-new-tokens",
        "64",
    ]
    for program in (["exaone-export"], ["python", "-m", "exaone_export"]):
        text = installed.run(*program, *command, "-q")[0].strip()
        if text != sample.text:
            raise Wrong(f"the answer is {text!r}, not {sample.text!r}")


def check_extras(installed: Installed, bundle: Path) -> None:
    """A constraint and a video through the libraries of the extras; the libraries of the others load."""
    text = installed.run("exaone-export", "generate", str(bundle), "Hi", "--regex", "(yes|no)", "--greedy", "-q")[0]
    if text.strip() not in ("yes", "no"):
        raise Wrong(f"a constrained answer is {text!r}")
    frames = [Image.new("RGB", (56, 56), (shade, 0, 0)) for shade in range(0, 250, 30)]
    frames[0].save(installed.scratch / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    installed.run("exaone-export", "generate", str(bundle), "Hi", "--video", "clip.gif", "--dry-run", "-q")
    installed.run("python", "-c", "import prompt_toolkit, matplotlib.pyplot")


def check_export(installed: Installed) -> str:
    """Exports and quantizes the demonstration checkpoint, and asks the result."""
    out = installed.scratch / "exported"
    command = ["export", str(checkpoint_folder()), str(out), "--quantize", "int8", "--force", "-q"]
    installed.run("exaone-export", *command)
    check_answer(installed, out, next(sample for sample in samples() if sample.task == "line"))
    return "done"


def check_no_export(installed: Installed) -> str:
    """Without the extra, `export` says what to install."""
    command = ["export", str(checkpoint_folder()), str(installed.scratch / "exported")]
    error = installed.run("exaone-export", *command, code=5)[1]
    if "exaone-export[export]" not in error or len(error.splitlines()) > 3:
        raise Wrong(f"a missing extra is reported so: {error[-500:]}")
    return "refused"
