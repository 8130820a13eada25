from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.assets import copy_assets, find_assets, missing_assets
from exporter.genai import genai_config
from model.bundle import file_sha256
from model.config import parse_config
from model.errors import BundleError, CheckpointError
from tests import tiny


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.make_checkpoint(tmp_path / "c", "vlm")


def test_files_are_taken_over_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes("줄\r\n \tend".encode())
    (checkpoint / "LICENSE.md").write_text("more")
    (checkpoint / "Licence.txt").write_text("more still")
    (checkpoint / "notice").write_text("of others")
    (checkpoint / "LICENSES").mkdir()
    (checkpoint / "training_args.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    infos = copy_assets(find_assets(checkpoint), out)
    assert set(infos) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "preprocessor_config.json", "LICENSE", "LICENSE.md", "Licence.txt", "notice",
    }  # fmt: skip
    for name, info in infos.items():
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
        assert (info.size, info.sha256) == ((out / name).stat().st_size, file_sha256(out / name))


def test_what_is_missing_is_said(checkpoint: Path) -> None:
    found = find_assets(checkpoint)
    assert missing_assets(found, vision=True) == ()
    for name, word in (("tokenizer.json", "token ids"), ("preprocessor_config.json", "images")):
        notes = missing_assets({key: path for key, path in found.items() if key != name}, vision=True)
        assert len(notes) == 1
        assert word in notes[0]
    assert missing_assets({}, vision=False)[0].startswith("The checkpoint has no tokenizer.json")


def test_links_that_lead_outside_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (checkpoint / "LICENSE").unlink()
    (checkpoint / "LICENSE").symlink_to(secret)
    with pytest.raises(BundleError, match="LICENSE: a link that leads outside"):
        find_assets(checkpoint)


def test_folders_and_huge_files_are_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="not an ordinary file"):
        find_assets(checkpoint)
    (checkpoint / "tokenizer.json").rmdir()
    with (checkpoint / "tokenizer.json").open("wb") as stream:
        stream.truncate(200 << 20)
    with pytest.raises(CheckpointError, match="more than the"):
        find_assets(checkpoint)


def test_genai_config_of_text_models() -> None:
    raw = genai_config(
        parse_config(tiny.make_config("hybrid")), {"temperature": 0.6, "do_sample": True, "top_k": "x"}, "cpu"
    )
    model, search = raw["model"], raw["search"]
    assert (model["type"], model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ("decoder", 53, 0, 1)
    assert model["decoder"]["filename"] == "decoder.onnx"
    assert model["decoder"]["inputs"]["input_ids"] == "input_ids"
    assert "inputs_embeds" not in model["decoder"]["inputs"]
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (2, 16)
    assert "vision" not in model
    assert "sliding_window" not in model["decoder"]
    assert (search["temperature"], search["do_sample"], search["top_k"]) == (0.6, True, 50)
    assert (search["max_length"], search["past_present_share_buffer"]) == (2048, True)
    json.dumps(raw, allow_nan=False)


@pytest.mark.parametrize(("target", "slack"), [("cpu", 64), ("cuda", 0)])
def test_genai_config_of_windows(target: str, slack: int) -> None:
    """The graph evicts by itself, in buffers of window and slack; onnxruntime's CUDA kernel takes no slack."""
    raw = genai_config(parse_config(tiny.make_config("hybrid")), {}, target, (0, 1, 2))
    assert raw["model"]["decoder"]["sliding_window"] == {
        "window_size": 8,
        "cache_slack": slack,
        "layers": [0, 1, 2],
        "slide_key_value_cache": False,
        "slide_inputs": False,
    }
    assert raw["search"]["past_present_share_buffer"] is True


def test_genai_config_of_image_models() -> None:
    raw = genai_config(parse_config(tiny.make_config("vlm", eos_token_id=[53, 1])), {}, "cuda")["model"]
    assert raw["type"] == "phi3v"
    assert raw["decoder"]["inputs"]["inputs_embeds"] == "inputs_embeds"
    assert raw["vision"]["filename"] == "vision_encoder.onnx"
    assert raw["embedding"]["filename"] == "embedding.onnx"
    assert raw["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
