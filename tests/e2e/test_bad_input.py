"""Bad input gets one short message and its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from exaone_export.cli import main
from model.bundle import file_sha256
from tests.e2e.conftest import Bundles
from tests.tiny import make_checkpoint


@dataclass(frozen=True)
class Place:
    """Where a case plays: a folder of its own, a checkpoint in it to be spoiled, and sound bundles elsewhere."""

    root: Path
    bundles: Bundles

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def export(self, *more: str) -> list[str]:
        return ["export", str(self.source), str(self.out), *more]

    def generate(self, kind: str, *more: str) -> list[str]:
        return ["generate", str(self.bundles.bundle(kind)), *more]

    def write(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def picture(self, name: str, size: tuple[int, int]) -> str:
        Image.new("RGB", size, (10, 200, 30)).save(self.root / name)
        return str(self.root / name)


Case = tuple[Callable[[Place], list[str]], int, str]


def edit_config(place: Place, **changes: object) -> list[str]:
    path = place.source / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return place.export()


def edit_weights(place: Place, change: Callable[[dict[str, np.ndarray]], object]) -> list[str]:
    path = place.source / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return place.export("--quantize", "int4")


def edit_bytes(place: Place, change: Callable[[bytes], bytes]) -> list[str]:
    path = place.source / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    return place.export()


def config_not_json(place: Place) -> list[str]:
    (place.source / "config.json").write_text("{")
    return place.export()


def poison(value: float) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    return change


def remove(place: Place, name: str) -> list[str]:
    (place.source / name).unlink()
    return place.export()


def only_pickle(place: Place) -> list[str]:
    (place.source / "model.safetensors").rename(place.source / "pytorch_model.bin")
    return place.export()


def recipe(text: str) -> Callable[[Place], list[str]]:
    return lambda place: place.export("--quantize", place.write("recipe.toml", text))


def existing_output(place: Place) -> list[str]:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("keep")
    return place.export()


def existing_file(place: Place) -> list[str]:
    place.out.write_text("keep")
    return place.export()


def shard_outside(place: Place) -> list[str]:
    (place.source / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (place.source / "model.safetensors.index.json").write_text(json.dumps(index))
    return place.export()


HEADER_TOO_LONG = struct.pack("<Q", 1 << 62)
EXPORTS: dict[str, Case] = {
    "no such folder": (lambda p: ["export", str(p.root / "nothing"), str(p.out)], 2, "nothing"),
    "a file as source": (lambda p: ["export", p.write("file", "x"), str(p.out)], 2, "file"),
    "no config": (lambda p: remove(p, "config.json"), 3, "config.json"),
    "no weights": (lambda p: remove(p, "model.safetensors"), 3, "model.safetensors"),
    "only pickled weights": (only_pickle, 3, "pytorch_model.bin"),
    "a shard outside": (shard_outside, 4, "outside"),
    "a byte short": (lambda p: edit_bytes(p, lambda b: b[:-1]), 3, "model.safetensors"),
    "cut in half": (lambda p: edit_bytes(p, lambda b: b[: len(b) // 2]), 3, "model.safetensors"),
    "empty weights": (lambda p: edit_bytes(p, lambda b: b""), 3, "model.safetensors"),
    "bytes behind the end": (lambda p: edit_bytes(p, lambda b: b + b"xx"), 3, "model.safetensors"),
    "an absurd header": (lambda p: edit_bytes(p, lambda b: HEADER_TOO_LONG + b[8:]), 3, "model.safetensors"),
    "a tensor missing": (
        lambda p: edit_weights(p, lambda t: t.pop("model.layers.1.self_attn.q_norm.weight")),
        3,
        "layers.1.self_attn.q_norm",
    ),
    "a tensor too many": (
        lambda p: edit_weights(p, lambda t: t.update({"model.layers.9.extra": np.ones(2, np.float32)})),
        3,
        "layers.9.extra",
    ),
    "another shape": (
        lambda p: edit_weights(p, lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)})),
        3,
        "norm.weight",
    ),
    "NaN": (lambda p: edit_weights(p, poison(float("nan"))), 7, "layers.2.mlp.up_proj"),
    "too large for fp16": (
        lambda p: [*edit_weights(p, poison(1e6))[:3], "--dtype", "fp16"],
        7,
        "layers.2.mlp.up_proj",
    ),
    "another model": (lambda p: edit_config(p, model_type="llama"), 2, "llama"),
    "EXAONE 3.5": (lambda p: edit_config(p, model_type="exaone"), 2, "exaone4"),
    "quantized in another way": (lambda p: edit_config(p, quantization_config={"quant_method": "hqq"}), 2, "hqq"),
    "a billion layers": (lambda p: edit_config(p, num_hidden_layers=10**9), 3, "num_hidden_layers"),
    "more layers than weights": (
        lambda p: edit_config(p, num_hidden_layers=5, layer_types=["full_attention"] * 5),
        3,
        "layers.4",
    ),
    "no theta": (lambda p: edit_config(p, rope_parameters=...), 3, "rope_theta"),
    "config not JSON": (config_not_json, 3, "config.json"),
    "an unknown key": (recipe('name = "x"\n[[rule]]\nmatch = "*"\nbits = 4\nblocksize = 32\n'), 2, "blocksize"),
    "an unknown top key": (recipe('name = "x"\nspeed = 1\n[[rule]]\nmatch = "*"\nbits = 4\n'), 2, "speed"),
    "3 bits": (recipe('name = "x"\n[[rule]]\nmatch = "*"\nbits = 3\n'), 2, "bits"),
    "an unknown method": (recipe('name = "x"\n[[rule]]\nmatch = "*"\nbits = 4\nmethod = "magic"\n'), 2, "magic"),
    "a recipe not TOML": (recipe("name = "), 2, "recipe.toml"),
    "an unknown recipe": (lambda p: p.export("--quantize", "int5"), 2, "int5"),
    "an unknown dtype": (lambda p: p.export("--dtype", "fp8"), 2, "fp8"),
    "an unknown task": (lambda p: p.export("--task", "dancing"), 2, "dancing"),
    "an unknown flag": (lambda p: p.export("--fast"), 2, "--fast"),
    "output exists": (existing_output, 2, "out"),
    "output is a file": (existing_file, 2, "out"),
    "output in the source": (lambda p: ["export", str(p.source), str(p.source / "out")], 2, "out"),
    "output is the source": (lambda p: ["export", str(p.source), str(p.source), "--force"], 2, "source"),
    "NaN, into a folder yet to be made": (
        lambda p: [*edit_weights(p, poison(float("nan")))[:2], str(p.root / "a" / "b")],
        7,
        "layers.2.mlp.up_proj",
    ),
    "quantizing what is quantized": (
        lambda p: ["quantize", str(p.bundles.bundle("dense", "int4")), str(p.out)],
        2,
        "quantized",
    ),
    "quantizing a checkpoint": (lambda p: ["quantize", str(p.source), str(p.out)], 4, "exaone_export.json"),
}


def message(role: str, *parts: dict[str, str]) -> str:
    return json.dumps([{"role": role, "content": list(parts)}])


def deep(p: Place) -> list[str]:
    return p.generate("dense", "--messages", p.write("m.json", "[" * 5000 + "]" * 5000))


GENERATES: dict[str, Case] = {
    "empty prompt": (lambda p: p.generate("dense", ""), 2, "empty"),
    "blank prompt": (lambda p: p.generate("vlm", " \n\t"), 2, "empty"),
    "no prompt": (lambda p: p.generate("dense"), 2, "PROMPT"),
    "too long": (lambda p: p.generate("dense", "word " * 600), 2, "2048"),
    "answer too long": (lambda p: p.generate("dense", "x" * 1000, "--max-new-tokens", "2000"), 2, "2048"),
    "image for a text model": (
        lambda p: p.generate("dense", "x", "--image", p.picture("a.png", (60, 60))),
        2,
        "text only",
    ),
    "image without placeholder": (
        lambda p: p.generate(
            "vlm",
            "--messages",
            p.write("m.json", message("user", {"type": "text", "text": "hi"})),
            "--image",
            p.picture("a.png", (60, 60)),
        ),
        2,
        "placeholder",
    ),
    "placeholder without image": (
        lambda p: p.generate("vlm", "--messages", p.write("m.json", message("user", {"type": "image"}))),
        2,
        "placeholder",
    ),
    "no such image": (lambda p: p.generate("vlm", "x", "--image", str(p.root / "none.png")), 2, "none.png"),
    "not an image": (lambda p: p.generate("vlm", "x", "--image", p.write("a.png", "<svg/>")), 2, "a.png"),
    "empty image": (lambda p: p.generate("vlm", "x", "--image", p.write("a.png", "")), 2, "a.png"),
    "a folder as image": (lambda p: p.generate("vlm", "x", "--image", str(p.root)), 2, ""),
    "cut image": (lambda p: cut_image(p), 2, "a.png"),
    "long strip": (lambda p: p.generate("vlm", "x", "--image", p.picture("a.png", (5000, 10))), 2, "200"),
    "image bomb": (lambda p: p.generate("vlm", "x", "--image", p.write("a.png", bomb(50_000))), 2, "a.png"),
    "a device as image": (lambda p: p.generate("vlm", "x", "--image", "/dev/zero"), 2, ""),
    "unknown role": (lambda p: p.generate("dense", "--messages", p.write("m.json", message("king"))), 2, "king"),
    "messages an object": (lambda p: p.generate("dense", "--messages", p.write("m.json", "{}")), 2, "m.json"),
    "no messages": (lambda p: p.generate("dense", "--messages", p.write("m.json", "[]")), 2, ""),
    "messages nested deep": (deep, 2, "m.json"),
    "negative temperature": (lambda p: p.generate("dense", "x", "--temperature", "-1"), 2, "temperature"),
    "temperature NaN": (lambda p: p.generate("dense", "x", "--temperature", "nan"), 2, "temperature"),
    "no new tokens": (lambda p: p.generate("dense", "x", "--max-new-tokens", "0"), 2, "max_new_tokens"),
    "no threads": (lambda p: p.generate("dense", "x", "--threads", "0"), 2, "threads"),
    "cuda without cuda": (lambda p: p.generate("dense", "x", "--ep", "cuda"), 5, "cpu"),
    "unknown provider": (lambda p: p.generate("dense", "x", "--ep", "abacus"), 2, "abacus"),
    "no such bundle": (lambda p: ["generate", str(p.root / "none"), "x"], 4, "none"),
    "a checkpoint as bundle": (lambda p: ["generate", str(p.source), "x"], 4, "exaone_export.json"),
    "verify without prompts": (
        lambda p: ["verify", str(p.bundles.bundle("dense")), "--source", str(p.source), "--prompts", "none.jsonl"],
        2,
        "none.jsonl",
    ),
    "verify against another source": (
        lambda p: ["verify", str(p.bundles.bundle("dense")), "--source", str(p.source)],
        4,
        "not the one",
    ),
    "inspect nothing": (lambda p: ["inspect", str(p.root / "none")], 2, "none"),
    "inspect beyond the context": (lambda p: ["inspect", str(p.source), "--context", "9999"], 2, "2048"),
    "no command": (lambda p: [], 2, "COMMAND"),
    "an unknown command": (lambda p: ["fly"], 2, "fly"),
}


def cut_image(place: Place) -> list[str]:
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(place.root / "a.png")
    content = (place.root / "a.png").read_bytes()
    return place.generate("vlm", "x", "--image", place.write("a.png", content[: len(content) // 2]))


def bomb(side: int) -> bytes:
    """The head of a PNG that says it is `side` pixels wide and high."""
    from zlib import crc32

    head = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", crc32(chunk))


@pytest.fixture
def place(tmp_path: Path, bundles: Bundles) -> Place:
    shutil.copytree(spare_checkpoint(bundles), tmp_path / "source")
    return Place(tmp_path, bundles)


def spare_checkpoint(bundles: Bundles) -> Path:
    folder = bundles.root / "spare"
    with bundles.making(folder) as missing:
        if missing:
            make_checkpoint(folder, "hybrid", seed=3)
    return folder


def snapshot(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): file_sha256(p) if p.is_file() else "" for p in sorted(root.rglob("*"))}


def check(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, code, mentioned = case
    arguments = prepare(place)
    shared = place.bundles.bundle("dense")
    before, shared_before = snapshot(place.root), snapshot(shared)
    capsys.readouterr()
    found = main(arguments)
    captured = capsys.readouterr()
    assert found == code, captured.err
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 3, captured.err
    assert lines[0].startswith("error: ")
    assert mentioned in captured.err
    assert len(captured.err) < 1000
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert snapshot(place.root) == before
    assert snapshot(shared) == shared_before


@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(EXPORTS[name], place, capsys)


@pytest.mark.parametrize("name", GENERATES)
def test_run(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(GENERATES[name], place, capsys)
