"""The sealed public surface of `exaone_export`."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import exaone_export as ee

PROMISED = {"export", "quantize", "load", "verify", "inspect", "Engine", "Result", "GenerationOptions"}


def test_all_is_sorted_and_is_what_dir_shows() -> None:
    assert ee.__all__ == sorted(ee.__all__)
    assert dir(ee) == sorted(ee.__all__)
    assert set(ee.__all__) >= PROMISED


@pytest.mark.parametrize("name", ee.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(ee, name)
    assert isinstance(value, str) or callable(value)


def test_every_public_thing_is_described() -> None:
    missing = [name for name in ee.__all__ if not name.startswith("__") and not inspect.getdoc(getattr(ee, name))]
    assert not missing


def test_functions_stay_functions_after_their_modules_are_imported() -> None:
    # A submodule called like a public function would replace it as an attribute of the package.
    program = (
        "import importlib, pkgutil, exaone_export as ee\n"
        "names = [m.name for m in pkgutil.iter_modules(ee.__path__)]\n"
        "print(sorted(set(names) & set(ee.__all__)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ee.nonsense
