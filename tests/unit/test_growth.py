"""How cost grows: the fits find what is there, the table and the picture show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth


def test_a_fit_finds_the_polynomial() -> None:
    sizes = [1, 64, 512, 4096]
    found = growth.fit(sizes, [0.02 + 0.007 * n + 3e-7 * n**2 for n in sizes], 2)
    assert found.coefficients == pytest.approx((0.02, 0.007, 3e-7), rel=1e-6)
    assert found.r_squared == pytest.approx(1)
    assert found.worst < 1e-9
    assert found.share(2, 4096) == pytest.approx(3e-7 * 4096**2 / found.at(4096))


def test_what_grows_otherwise_is_not_hidden() -> None:
    sizes = [64, 512, 1024, 4096]
    cubes = growth.fit(sizes, [0.01 + 1e-9 * n**3 for n in sizes], 1)
    assert cubes.worst > 0.5
    assert growth.fit(sizes, [0.1, 0.1, 0.1, 0.1], 1).coefficients == pytest.approx((0.1, 0), abs=1e-12)


def test_tables_have_medians_and_fits() -> None:
    decode = growth.Series("decoding", "tokens", 1, {9: [0.2, 0.1, 0.9], 1009: [1.7, 1.7, 1.7]})
    lines = growth.table([decode]).splitlines()
    assert lines[2] == "| decoding, tokens | 9: 200 ms, 1009: 1.70 s |"
    assert lines[6] == "| decoding | 186 ms | 1.50 s | – | 1.0000 | 0.0 % | 89.0 % | – |"


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    decode = growth.Series("decoding", "tokens", 1, {9: [0.2, 0.1, 0.9], 1009: [1.7, 1.7, 1.7]})
    growth.draw([decode], tmp_path / f"a{suffix}", "title")
    assert 1000 < (tmp_path / f"a{suffix}").stat().st_size < 150_000
