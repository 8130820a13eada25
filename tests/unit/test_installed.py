"""Which of several onnxruntimes owns the folder, told from records of distributions that were never installed."""

from __future__ import annotations

import base64
import hashlib
import shutil
from pathlib import Path

import pytest

from model.errors import EnvironmentFault
from runtime import providers
from runtime.installed import Mixed, installed_runtimes, mixed_install, sharing, winner

FILES = {"__init__.py": "", "capi/build_and_package_info.py": "package_name = {!r}\n", "capi/state.so": "\x7f{}"}
EXTRA = {"capi/libonnxruntime_providers_cuda.so": "kernels of {}"}


def install(folder: Path, name: str, version: str = "1.31.1", *, extra: dict[str, str] | None = None) -> None:
    """What an installer does: writes the files over those that are there, and a record of its own."""
    record = []
    for file, text in (FILES | (extra or {})).items():
        content = text.format(name).encode()
        path = folder / "onnxruntime" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"onnxruntime/{file},sha256={digest},{len(content)}")
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("\n".join(record) + "\n")


def test_one_distribution_is_whole(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime")
    (found,) = installed_runtimes([str(tmp_path), str(tmp_path)])
    assert (found.name, found.version, found.present, found.whole) == ("onnxruntime", "1.31.1", 2, True)
    assert mixed_install([found]) is None


@pytest.mark.parametrize(("first", "last"), [("onnxruntime-gpu", "onnxruntime"), ("onnxruntime", "onnxruntime-gpu")])
def test_of_two_in_one_folder_the_last_one_wins(tmp_path: Path, first: str, last: str) -> None:
    for name in (first, last):
        install(tmp_path, name, extra=EXTRA if name.endswith("gpu") else None)
    found = installed_runtimes([str(tmp_path)])
    best = winner(sharing(found))
    assert best is not None
    assert best.name == last
    mixed = mixed_install(found)
    assert mixed is not None
    assert "onnxruntime 1.31.1" in mixed.what
    assert "onnxruntime-gpu 1.31.1" in mixed.what
    assert mixed.what.endswith(f"those of {last}")
    assert mixed.with_gpu == (last == "onnxruntime-gpu")
    assert mixed.remedy.startswith("pip uninstall -y ")
    assert mixed.remedy.endswith("pip install 'onnxruntime-gpu[cuda,cudnn]'")


def test_files_of_equal_size_are_told_apart(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime")
    path = tmp_path / "onnxruntime/capi/build_and_package_info.py"
    path.write_text(path.read_text().replace("onnxruntime", "ortruntimes"))
    (found,) = installed_runtimes([str(tmp_path)])
    assert found.replaced == ("build_and_package_info.py",)


def test_removing_one_of_two_leaves_the_other_in_pieces(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime-gpu", extra=EXTRA)
    for file in FILES:
        (tmp_path / "onnxruntime" / file).unlink()
    (found,) = installed_runtimes([str(tmp_path)])
    assert found.missing == ("build_and_package_info.py", "state.so")
    assert found.present == 1
    assert mixed_install([found]) is None


def test_two_folders_do_not_mix(tmp_path: Path) -> None:
    for place, name in (("a", "onnxruntime-gpu"), ("b", "onnxruntime")):
        install(tmp_path / place, name)
    found = installed_runtimes([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [item.name for item in found] == ["onnxruntime-gpu", "onnxruntime"]
    assert sharing(found) == ()
    assert mixed_install(found) is None


def test_neither_wins_where_both_have_lost_files(tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(tmp_path, name)
    (tmp_path / "onnxruntime/capi/state.so").write_text("of a third")
    mixed = mixed_install(installed_runtimes([str(tmp_path)]))
    assert mixed is not None
    assert mixed.what.endswith("of more than one")


def test_neighbours_and_damaged_metadata_are_not_counted(tmp_path: Path) -> None:
    for name, record in (("onnxruntime-genai", "onnxruntime_genai/__init__.py,,\n"), ("onnxruntime-nothing", "")):
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "RECORD").write_text(record)
    (tmp_path / "broken-1.dist-info").mkdir()
    assert installed_runtimes([str(tmp_path)]) == ()


def test_a_distribution_without_record_counts_by_its_name(tmp_path: Path) -> None:
    install(tmp_path, "onnxruntime")
    (tmp_path / "onnxruntime-1.31.1.dist-info" / "RECORD").unlink()
    assert [item.name for item in installed_runtimes([str(tmp_path)])] == ["onnxruntime"]
    shutil.rmtree(tmp_path / "onnxruntime")
    assert installed_runtimes([str(tmp_path)]) == ()


@pytest.mark.skipif("cuda" in providers.available_providers(), reason="needs an onnxruntime without CUDA")
def test_asking_for_cuda_names_the_mixed_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for with_gpu, advice in (
        (False, "In fact two are there; repair it: pip uninstall -y both"),
        (True, "see .* doctor"),
    ):
        found = Mixed("two are there", "pip uninstall -y both", with_gpu)
        monkeypatch.setattr(providers, "mixed_install", lambda found=found: found)
        with pytest.raises(EnvironmentFault, match=advice):
            providers.choose_provider("cuda")
