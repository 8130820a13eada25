"""R01 to R13: faults of the machine, and of what happens to a bundle while it runs.

Numbers are those of the table of faults that the toolkit is tried against. R08 to R10 for conversations are in
`test_r_conversations.py`, R08 for `chat` in `tests/e2e/test_chat.py`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exaone_export.cli import main
from exporter.export import export_checkpoint
from model.errors import BundleError, NumericalError, ResourceError
from runtime import decode, memory, providers
from runtime.engine import Engine
from runtime.forward import TextForward
from runtime.graphs import Graphs
from runtime.options import GenerationOptions
from tests.faults.crash import PLAIN_LOCALE
from tests.tiny import make_checkpoint

FEW = GenerationOptions(do_sample=False, max_new_tokens=6)
MANY = GenerationOptions(do_sample=False, max_new_tokens=60)
ROOT = Path(__file__).parents[2]
without_cuda = pytest.mark.skipif("cuda" in providers.available_providers(), reason="there is CUDA")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    # No token ends a turn, so that answers are as long as is asked.
    source = make_checkpoint(folder / "source", "hybrid", seed=3, dtype="fp32", eos_token_id=0)
    (source / "generation_config.json").write_text('{"eos_token_id": 0}')
    export_checkpoint(source, folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine.load(bundle) as opened:
        yield opened


def refused(capsys: pytest.CaptureFixture[str], code: int, bundle: Path, *flags: str) -> str:
    """The message of an answer that ends with `code`, and says no more than that."""
    capsys.readouterr()
    found = main(["generate", str(bundle), "x", "--greedy", "--max-new-tokens", "6", *flags])
    out, err = capsys.readouterr()
    assert (found, out) == (code, ""), err
    assert len([line for line in err.splitlines() if not line.startswith("warning: ")]) <= 3
    assert "Traceback" not in err
    return err


@without_cuda
def test_r01_a_provider_that_is_not_here(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "only: cpu" in refused(capsys, 5, bundle, "--ep", "cuda")
    assert main(["generate", str(bundle), "x", "--greedy", "--max-new-tokens", "2", "--ep", "auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ep"] == "cpu"


def test_r02_a_provider_whose_driver_is_missing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = [providers.CUDA, providers.CPU]
    monkeypatch.setattr(providers.onnxruntime(), "get_available_providers", lambda: built)
    monkeypatch.setattr(providers, "provider_loads", lambda name: name == providers.CPU)
    assert "available: cpu" in refused(capsys, 5, bundle, "--ep", "cuda")
    with Engine.load(bundle, "auto") as engine:
        assert engine.ep == "cpu"


def test_r03_a_provider_that_nobody_knows(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cdua", "", "CUDA Execution", "cpu,cuda", "../cpu"):
        assert "auto or one of: " in refused(capsys, 2, bundle, "--ep", name)


def test_r04_another_onnxruntime(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ort = providers.onnxruntime()
    with monkeypatch.context() as patch:
        patch.setattr(ort, "__version__", "1.22.1")
        assert "1.22.1 is older than" in refused(capsys, 5, bundle)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert "Install onnxruntime" in refused(capsys, 5, bundle)
    wanted = Engine.load(bundle).generate("x", options=FEW).token_ids
    monkeypatch.setattr(ort, "__version__", "9.0.0")  # newer than any that was tried
    with Engine.load(bundle) as engine:
        assert engine.generate("x", options=FEW).token_ids == wanted


def test_r05_a_model_larger_than_the_memory(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("a graph was opened")

    monkeypatch.setattr(Graphs, "_opened", opened)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert "its weights take" in refused(capsys, 6, bundle)


def test_r06_absurd_threads(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for threads in ("0", "-1", "10000", "1.5", "many"):
        assert "threads" in refused(capsys, 2, bundle, "--threads", threads)


def test_r07_a_context_that_does_not_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.open()
    wanted = engine.generate("x", options=FEW).token_ids
    session = engine.session()
    for ask in (engine.generate, session.send, lambda prompt, **more: list(engine.stream(prompt, **more))):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "available_bytes", lambda: 1000)
            with pytest.raises(ResourceError, match=r"At most \d+ tokens fit"):
                ask("x" * 1000, options=FEW)
    assert session.messages == []
    assert session.send("x", options=FEW).token_ids == engine.generate("x", options=FEW).token_ids == wanted


def test_r08_an_interrupt_keeps_the_text_so_far(bundle: Path) -> None:
    command = [sys.executable, "-m", "exaone_export", "generate", str(bundle), "x", "--greedy", "--threads", "1"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert running.stdout is not None
    try:
        first = os.read(running.stdout.fileno(), 1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert b"Traceback" not in err
    with Engine.load(bundle) as engine:
        whole = engine.generate("x", do_sample=False).text.encode()
    said = (first + out).rstrip(b"\n")
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)


def test_r09_engines_open_and_close(bundle: Path) -> None:
    counts, resident = [], []
    for number in range(24):
        with Engine.load(bundle, threads=1) as engine:
            engine.generate("x", options=FEW)
        if number in (7, 23):
            gc.collect()
            counts.append(len(os.listdir("/proc/self/fd")))
            fields = Path("/proc/self/status").read_text().splitlines()
            resident.append(next(int(line.split()[1]) for line in fields if line.startswith("RssAnon")))
    assert counts[1] <= counts[0]
    assert resident[1] - resident[0] < 8 << 10  # KiB


def test_r10_two_processes_on_one_bundle(bundle: Path, engine: Engine) -> None:
    command = [sys.executable, "-m", "exaone_export", "chat", str(bundle), "--greedy", "--max-new-tokens", "6"]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        for _ in range(2)
    ]
    said = [process.communicate("가\n나\n".encode(), timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != b""


@pytest.mark.parametrize("how", ["deleted", "swapped"])
def test_r11_a_bundle_that_changes_while_it_runs(bundle: Path, tmp_path: Path, how: str) -> None:
    """What is open stays what it was: files are removed or put in the place of others, never written over."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with Engine.load(copy) as engine:
        wanted = engine.generate("x", options=MANY).token_ids
        stream = engine.stream("x", options=MANY)
        next(stream)
        if how == "deleted":
            shutil.rmtree(copy)
        else:
            for path in copy.iterdir():
                (tmp_path / "new").write_bytes(b"\0" * path.stat().st_size)
                (tmp_path / "new").replace(path)
        last = list(stream)[-1].result
        assert last is not None
        assert last.token_ids == wanted
        assert engine.generate("x", options=MANY).token_ids == wanted


@pytest.mark.parametrize("how", ["cut", "emptied", "written over"])
def test_r11_data_that_is_written_to_while_it_runs(bundle: Path, tmp_path: Path, how: str) -> None:
    """Reading behind the end of a mapped file kills a process; the next token is refused instead."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = copy / "decoder.onnx.data"
    with Engine.load(copy) as engine:
        stream = engine.stream("x", options=MANY)
        next(stream)
        if how == "written over":
            with data.open("r+b") as file:
                file.write(bytes(4096))
            os.utime(data, (1, 1))  # whatever the clock's grain is
        else:
            os.truncate(data, 0 if how == "emptied" else data.stat().st_size // 2)
        with pytest.raises(BundleError, match=r"decoder\.onnx\.data: it was written to while it was open"):
            list(stream)
        with pytest.raises(BundleError, match="while it was open"):
            engine.generate("x", options=FEW)


@pytest.fixture
def before_nan(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Logits become NaN with the fourth pass; the text until then."""
    with Engine.load(bundle) as engine:
        text = engine.generate("x", do_sample=False, max_new_tokens=3).text
    plain, passes = TextForward.__call__, 0

    def call(self: TextForward, ids: decode.Ids, lengths: decode.Ids, *rest: Any, **more: Any) -> decode.Logits:
        nonlocal passes
        passes += 1
        logits = plain(self, ids, lengths, *rest, **more)
        return logits if passes < 4 else np.full_like(logits, np.nan)

    monkeypatch.setattr(TextForward, "__call__", call)
    return text


def test_r12_logits_that_become_nan(bundle: Path, before_nan: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", str(bundle), "x", "--max-new-tokens", "50", "--greedy"])
    out, err = capsys.readouterr()
    assert code == 7
    assert "cannot choose a token" in err
    assert out.rstrip("\n") == before_nan


@pytest.mark.usefixtures("before_nan")
def test_r12_logits_that_become_nan_in_a_conversation(engine: Engine) -> None:
    session = engine.session()
    with pytest.raises(NumericalError, match="cannot choose a token"):
        session.send("x", options=MANY)
    assert session.messages == []


RUN = """
import sys
def refuse(event, _):
    if event.startswith(("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")):
        raise RuntimeError(event)
sys.addaudithook(refuse)
for name in ("onnx", "torch", "transformers", "safetensors", "onnx_ir"):
    sys.modules[name] = None
from exaone_export.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": PLAIN_LOCALE}, {"LC_ALL": PLAIN_LOCALE, "PYTHONIOENCODING": "ascii"}],
    ids=["C", "ascii"],
)
def test_r13_a_bare_environment(bundle: Path, environment: dict[str, str], engine: Engine) -> None:
    """No home, no network, no locale, nothing that only the export needs, and a folder nobody can write into."""
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    bare |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    command = [sys.executable, "-c", RUN, "generate", str(bundle), "안녕", "--greedy", "--max-new-tokens", "30"]
    done = subprocess.run(command, env=bare | environment, capture_output=True, cwd="/proc", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    said = engine.generate("안녕", do_sample=False, max_new_tokens=30).text
    encoding = "ascii" if "PYTHONIOENCODING" in environment else "utf-8"
    assert done.stdout.decode(encoding).rstrip("\n") == said.encode(encoding, "backslashreplace").decode().rstrip("\n")
