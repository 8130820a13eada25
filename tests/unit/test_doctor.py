"""What `doctor` concludes, from answers that no machine here could give; and its children, which crash and hang."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from exaone_export import cli
from exaone_export.commands import doctor
from exaone_export.doctor import examine
from exaone_export.doctor.advise import ALL_BUNDLES
from exaone_export.doctor.probe import Reply, ask_child
from exaone_export.doctor.report import Diagnosis, Gpu, Wheel
from model.errors import UsageError
from runtime import providers
from runtime.installed import Installed

ROOT = Path(__file__).parents[2]
NEEDED = ("libcublas.so.13", "libcudart.so.13", "libcuda.so.1")
H200: dict[str, Any] = {"name": "NVIDIA H200", "total": 150_000_000_000, "free": 149_000_000_000, "capability": "9.0"}
DRIVEN = {"driver": "580.159.03", "cuda": "13.0", "gpus": [H200], "source": "nvml", "board": ""}
GPU_BUILD = {
    "version": "1.31.1", "build": "", "folder": "", "cuda": "13.0", "cudnn": "",
    "providers": ["cuda", "cpu"], "known": ["cuda", "cpu"],
}  # fmt: skip
CPU_BUILD = GPU_BUILD | {"cuda": "", "providers": ["cpu"]}
RIGHT = {"loads": True, "why": "", "seconds": 0.1}
GPU_PACKAGE = Installed("onnxruntime-gpu", "1.31.1", Path("site/onnxruntime"), present=2)
CPU_PACKAGE = Installed("onnxruntime", "1.31.1", Path("site/onnxruntime"), present=2)


def diagnose(
    monkeypatch: pytest.MonkeyPatch,
    *,
    about: Mapping[str, Any] | Reply = GPU_BUILD,
    loads: Mapping[str, Reply] | None = None,
    missing: tuple[str, ...] = (),
    graphics: Mapping[str, Any] | None = None,
    installed: tuple[Installed, ...] = (GPU_PACKAGE,),
    ep: str | None = None,
) -> Diagnosis:
    """An examination in which children answer as told."""
    known = loads or {}

    def ask(name: str, *arguments: Any) -> Reply:
        if name == "describe":
            return about if isinstance(about, Reply) else Reply(dict(about))
        if name == "load":
            return known.get(arguments[0], Reply(RIGHT))
        if name == "libraries":
            return Reply([{"name": n, "found": n not in missing, "version": ""} for n in arguments[0]])
        return Reply(dict(graphics) if graphics is not None else dict(DRIVEN, driver="", cuda="", gpus=[], source=""))

    monkeypatch.setattr(examine, "installed_runtimes", lambda: installed)
    needs = NEEDED if not isinstance(about, Reply) and about["cuda"] else ()
    monkeypatch.setattr(examine, "needed_libraries", lambda path: needs)
    monkeypatch.setattr(examine, "cuda_wheels", lambda: (Wheel("nvidia-curand", "~=10.0", "9.0", False),))
    monkeypatch.setattr(examine, "export_libraries", lambda: {"torch": "2.13.0"})
    return examine.examine(ep, ask)


def said(found: Diagnosis, level: str = "error") -> list[tuple[str, str]]:
    return [(finding.what, finding.remedy) for finding in found.findings if finding.level == level]


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(monkeypatch, graphics=DRIVEN, ep="cuda")
    assert found.ok
    assert said(found) == []
    assert found.graphics.gpus == (Gpu(**H200),)
    assert (found.runtime.cuda, found.runtime.cudnn) == ("13.0", "9")
    assert [library.name for library in found.libraries if library.required] == list(NEEDED)
    cuda = found.provider("cuda")
    assert cuda is not None
    assert cuda.loads


def test_libraries_that_are_missing_are_named_with_the_line_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "[E:onnxruntime:Default, x.cc:1 f] Failed to load library with error: libcublas.so.13: cannot open"
    broken = Reply({"loads": False, "why": "onnxruntime took cpu instead"}, log=log)
    found = diagnose(monkeypatch, loads={"cuda": broken}, missing=NEEDED[:1], graphics=DRIVEN, ep="cuda")
    assert not found.ok
    cuda = found.provider("cuda")
    assert cuda is not None
    assert cuda.why == "libcublas.so.13: cannot open"
    ((what, remedy),) = said(found)
    assert what.endswith("libcublas.so.13 was not found")
    assert remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"
    assert said(found, "warning") == [
        ("nvidia-curand 9.0 is installed, onnxruntime-gpu wants ~=10.0", "pip install 'nvidia-curand~=10.0'")
    ]
    assert diagnose(monkeypatch, loads={"cuda": broken}, missing=NEEDED[:1], graphics=DRIVEN).ok  # the CPU does


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(monkeypatch, loads={"cuda": Reply({"loads": False, "why": "no"})}, missing=NEEDED[2:], ep="cuda")
    assert said(found)[0][0].endswith("there is no NVIDIA driver")
    assert "driver 580 or newer" in said(found)[0][1]


def test_driver_of_an_older_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    old = DRIVEN | {"driver": "550.90.07", "cuda": "12.4"}
    found = diagnose(monkeypatch, loads={"cuda": Reply(None, "its process crashed (SIGSEGV)")}, graphics=old)
    what, remedy = said(found)[0]
    assert "550.90.07 runs CUDA up to 12.4, this onnxruntime needs 13.0" in what
    assert "'onnxruntime-gpu[cuda,cudnn]<1.27'" in remedy
    newer = DRIVEN | {"cuda": "13.2"}
    assert said(diagnose(monkeypatch, graphics=newer)) == []


def test_a_gpu_that_nobody_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: dict[str, Any] = {"about": CPU_BUILD, "graphics": DRIVEN, "installed": (CPU_PACKAGE,)}
    found = diagnose(monkeypatch, **kind)
    assert found.ok
    assert said(found) == []
    ((what, remedy), *_) = said(found, "warning")
    assert what.startswith("NVIDIA H200 is not used")
    assert remedy == "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert not diagnose(monkeypatch, **kind, ep="cuda").ok


def test_a_mixed_install_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (CPU_PACKAGE, Installed("onnxruntime-gpu", "1.31.1", CPU_PACKAGE.folder, 1, ("state.so",)))
    found = diagnose(monkeypatch, about=CPU_BUILD, graphics=DRIVEN, installed=both, ep="cuda")
    ((what, remedy),) = said(found)
    assert what.endswith("its files are those of onnxruntime")
    assert remedy.startswith("pip uninstall -y onnxruntime ")


def test_what_cannot_be_imported_or_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    none = diagnose(monkeypatch, about=Reply(None, "No module named 'onnxruntime'"), installed=())
    assert not none.ok
    assert said(none) == [("onnxruntime is not installed", "pip install --force-reinstall 'onnxruntime>=1.24,<2'")]
    torn = Installed("onnxruntime", "1.31.1", CPU_PACKAGE.folder, 1, missing=("state.so",))
    found = diagnose(monkeypatch, about=Reply(None, "its process crashed (SIGABRT)"), installed=(torn,))
    assert said(found)[0][1] == "pip install --force-reinstall --no-deps onnxruntime==1.31.1"
    assert len(said(found)) == 1
    found = diagnose(
        monkeypatch, about=Reply(None, "its process crashed (SIGABRT)"), installed=(GPU_PACKAGE,), ep="cuda"
    )
    assert "SIGABRT" in said(found)[0][0]
    assert said(found)[0][1] == "pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]>=1.24,<2'"
    old = diagnose(monkeypatch, about=CPU_BUILD | {"version": "1.22.1"}, installed=(CPU_PACKAGE,))
    assert not old.ok
    assert said(old) == [("onnxruntime 1.22.1 is not >=1.24,<2", "pip install --upgrade 'onnxruntime>=1.24,<2'")]


def test_jetsons_are_sent_to_their_page(monkeypatch: pytest.MonkeyPatch) -> None:
    board = DRIVEN | {"board": "NVIDIA Jetson AGX Orin"}
    found = diagnose(monkeypatch, about=CPU_BUILD, graphics=board, installed=(CPU_PACKAGE,))
    assert said(found, "warning")[0][1] == "See docs/jetson.md"


def test_the_wanted_range_is_what_the_runtime_takes() -> None:
    assert f">={'.'.join(map(str, providers._OLDEST))},<2" == examine.WANTED


def test_versions_that_do_not_run_every_bundle_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert f"onnxruntime{ALL_BUNDLES},<2" in lines
    between = diagnose(monkeypatch, about=CPU_BUILD | {"version": "1.28.0"}, installed=(CPU_PACKAGE,))
    assert between.ok
    ((what, remedy),) = said(between, "warning")
    assert what == "onnxruntime 1.28.0 runs only bundles made with --kv-cache full"
    assert remedy == "pip install --upgrade 'onnxruntime>=1.29'"
    assert (
        said(diagnose(monkeypatch, about=CPU_BUILD | {"version": "1.29.0"}, installed=(CPU_PACKAGE,)), "warning") == []
    )


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("import os; os.abort()", "its process crashed (SIGABRT)"),
        ("import time; time.sleep(60)", "it did not answer within 1 seconds"),
        ("import sys; print('words'); sys.exit('cannot: with error: /a/b/libx.so: gone')", "code 1: libx.so: gone"),
    ],
)
def test_children_that_crash_hang_and_chatter(start: str, expected: str) -> None:
    reply = ask_child("describe", timeout=1 if "sleep" in start else 60, start=start)
    assert reply.answer is None
    assert expected in reply.why


def test_a_child_loads_the_cpu_and_says_what_does_not_load() -> None:
    assert ask_child("load", "cpu").answer["loads"]
    assert "StopIteration" in ask_child("load", "nonsense").why
    found = ask_child("libraries", ["libnothing.so.77"])
    assert [item["found"] for item in found.answer] == [False]
    assert ask_child("describe").answer["version"] in subprocess.run(
        [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def test_unknown_providers_are_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"'cdua'.*one of: cuda, cpu"):
        diagnose(monkeypatch, ep="cdua")
    known = GPU_BUILD | {"known": ["cuda", "cpu", "openvino"]}
    found = diagnose(monkeypatch, about=known, ep="openvino", graphics=DRIVEN)
    assert not found.ok
    assert said(found)[0][0] == "this onnxruntime has no openvino, only cuda, cpu"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(monkeypatch, missing=NEEDED[:1], loads={"cuda": Reply({"loads": False, "why": "no"})})
    monkeypatch.setattr(examine, "examine", lambda ep: found)
    assert cli.main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err == ""
    report = json.loads(captured.out)
    assert report["ok"] is True
    assert report["providers"][0]["name"] == "cuda"
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "provider   cuda does not load" in text
    assert "library    libcublas.so.13 not found" in text


def test_the_command_fails_where_cuda_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"cuda": Reply(None, "it did not answer within 90 seconds")}
    found = diagnose(monkeypatch, loads=bad, graphics=DRIVEN, ep="cuda")
    asked = []

    def asked_for(ep: str | None) -> Diagnosis:
        asked.append(ep)
        return found

    monkeypatch.setattr(examine, "examine", asked_for)
    assert cli.main(["doctor", "--json", "--ep", "CUDAExecutionProvider"]) == 5
    captured = capsys.readouterr()
    assert asked == ["cuda"]
    assert len(captured.out.splitlines()) == 1
    assert captured.err.startswith(
        "error: cannot run bundles here: cuda: cuda is built in and does not load: it did not"
    )
    assert len(captured.err.splitlines()) == 1


def test_here_bundles_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "exaone_export", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert {key: report["providers"][-1][key] for key in ("name", "loads")} == {"name": "cpu", "loads": True}
    assert report["runtime"]["fits"]
    assert report["runtime"]["telemetry"] == "off"


def test_neither_torch_nor_onnx_is_imported() -> None:
    code = (
        "import sys; from exaone_export.doctor.examine import examine; examine();"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_the_docstring_says_the_exit_codes() -> None:
    assert "0 if bundles run" in (doctor.__doc__ or "")
    assert "5 if not" in (doctor.__doc__ or "")
