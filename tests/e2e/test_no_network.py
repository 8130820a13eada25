"""Nothing that works with files of this machine opens a socket, and ONNX Runtime's telemetry leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import no_network
from tests.e2e.conftest import Bundles
from tests.videos import moving, write_video

ROOT = Path(__file__).parents[2]
COMMANDS = """
import json, sys
from exaone_export.cli import main
print(json.dumps([main(argv) for argv in json.loads(sys.argv[1])]), file=sys.stderr)
"""
# Of ONNX Runtime and of Hugging Face's libraries: the user's own wishes would hide what the defaults are.
WISHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def without(what: str, program: str, *arguments: str, home: Path, **wishes: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program that dies where it, a thread or a child of it asks for `what`, see `tests.no_network`."""
    environment = {name: value for name, value in os.environ.items() if name not in WISHES and "XDG" not in name}
    # LOGNAME: torch asks for the user's name, and the C library its daemon, which is a connection within the machine.
    command = [sys.executable, no_network.__file__, what, sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=home, timeout=280, input="Hello\n",
        env={**environment, "HOME": str(home), "LOGNAME": "user", "PYTHONPATH": str(ROOT), **wishes},
    )  # fmt: skip
    if done.returncode == no_network.UNAVAILABLE:
        pytest.skip("no seccomp filters here")
    return done


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None).socket(10, 2, 0)",
        "import ctypes; ctypes.CDLL(None).socket(16, 3, 0)",
        "import threading, ctypes; threading.Thread(target=ctypes.CDLL(None).socket, args=(2, 1, 0)).start()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",  # a name may be asked of a daemon of this machine
    ],
)
def test_the_check_sees_sockets(program: str, home: Path) -> None:
    """Python's and native ones, of another thread, of a child; pipes between processes of this machine are none."""
    assert without("sockets", program, home=home).returncode == -signal.SIGSYS
    child = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {program!r}]).returncode)"
    assert without("sockets", child, home=home).stdout == f"{-signal.SIGSYS}\n"
    assert without("sockets", "import socket; socket.socketpair(); print('lives')", home=home).stdout == "lives\n"


def test_the_check_sees_connections(home: Path) -> None:
    connect = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print('lives', flush=True); "
    for sending in ("s.connect(s.getsockname())", "s.sendto(b'', s.getsockname())", "s.sendmsg([b''])"):
        done = without("connections", connect + sending, home=home)
        assert (done.stdout, done.returncode) == ("lives\n", -signal.SIGSYS)


def test_running_a_bundle_opens_no_socket(bundles: Bundles, tmp_path: Path, home: Path) -> None:
    """Images, a video, the processes that render the template and decode, batches, conversations, the doctor."""
    bundle = str(bundles.bundle("vlm", "int8"))
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "a.png")
    media = ["--image", str(tmp_path / "a.png")]
    if _has("av"):
        media += ["--video", str(write_video(tmp_path / "a.avi", moving(4), "mjpeg"))]
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "Hi"}\n')
    few = ["--greedy", "--max-new-tokens", "2", "-q"]
    commands = [
        ["generate", bundle, "Hi", *media, *few],
        ["verify", bundle, "-q"],
        ["inspect", bundle],
        ["batch", bundle, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *few],
        ["chat", bundle, *few],
        ["doctor"],
    ]
    done = without("sockets", COMMANDS, json.dumps(commands), home=home)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert json.loads(done.stderr.splitlines()[-1]) == [0] * len(commands), done.stderr
    assert list(home.iterdir()) == []


def test_exporting_from_a_folder_connects_to_nothing(bundles: Bundles, tmp_path: Path, home: Path) -> None:
    """Importing urllib3 opens a socket: it binds one to ::1 to see whether there is IPv6. Nothing is sent."""
    source, out = str(bundles.source("hybrid")), tmp_path / "out"
    commands = [
        ["export", source, str(out), "-q"],
        ["quantize", str(out), f"{out}-int4", "--quantize", "int4", "-q"],
        ["inspect", source],
    ]
    done = without("connections", COMMANDS, json.dumps(commands), home=home)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert json.loads(done.stderr.splitlines()[-1]) == [0] * len(commands), done.stderr
    left = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert not any("onnxruntime" in name.lower() or "huggingface" in name.lower() for name in left), left


def test_onnxruntime_left_to_itself_would_report(bundles: Bundles, home: Path) -> None:
    """The files of its telemetry are what the other tests look for: they are there as soon as a user wants them."""
    run = "import exaone_export as ee, sys; ee.load(sys.argv[1]).generate('Hi', max_new_tokens=1)"
    bundle = str(bundles.bundle("hybrid", "int8"))
    assert without("sockets", run, bundle, home=home).returncode == 0
    assert list(home.iterdir()) == []
    without("sockets", run, bundle, home=home, ORT_DISABLE_TELEMETRY="0")
    if not list(home.iterdir()):
        pytest.skip("this onnxruntime was built without telemetry")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
