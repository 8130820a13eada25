"""What calibration gathers is what transformers' own modules are given, in the float model and in the quantized one."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.load import load_exaone
from model.progress import NullProgress
from quantize.calibration.job import Calibration
from quantize.calibration.plan import Parts, Plan
from quantize.calibration.prompts import Prompt, PromptSet, even_weights, token_weights
from quantize.calibration.run import Run, open_folder
from quantize.calibration.stages import Refs, Stage, Stages
from quantize.calibration.store import INPUT_SCALE, Store
from quantize.methods import HESSIAN
from quantize.recipe import Recipe, Rule
from quantize.scheme import Floats, Scheme, Statistics
from tests import calibrating, tiny
from tests.parity.imported import transformers_model

Found = dict[str, Statistics]
CPU = torch.device("cpu")


class Recorder:
    """Leaves every weight as it is, and keeps what is known about its inputs."""

    def __init__(self) -> None:
        self.found: Found = {}

    def need(self, path: str) -> str:
        return HESSIAN

    def changes(self, path: str) -> bool:
        return False

    def known(self, paths: Sequence[str], statistics: Statistics) -> dict[str, Statistics]:
        return dict.fromkeys(paths, statistics)

    def quantize(self, path: str, statistics: Statistics | None) -> Parts:
        assert statistics is not None
        self.found[path] = statistics
        return {}

    def restored(self, path: str, parts: Parts) -> Iterator[tuple[slice, Floats]]:
        return iter(())


class Watched:
    """Sums up what goes into the linear layers of a module, with torch's own hooks."""

    def __init__(self, module: nn.Module, weights: list[Floats]) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self._seen: dict[str, int] = {}
        self._weights = weights
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(lambda _, inputs, name=name: self._see(name, inputs[0]))

    def _see(self, name: str, x: torch.Tensor) -> None:
        rows = x.detach().double().flatten(0, -2)
        number = self._seen.get(name, 0)
        weights = torch.from_numpy(self._weights[number]).double()
        self._seen[name] = number + 1
        self.sums[name] = self.sums.get(name, torch.zeros(1)) + rows.T @ (rows * weights[:, None])


def oracle_inputs(prompt: Prompt) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(prompt.ids)[None]}
    if prompt.pixels is not None:
        inputs |= {"pixel_values": torch.from_numpy(prompt.pixels()), "image_grid_thw": torch.from_numpy(prompt.grids)}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.SPECIAL["<|image_pad|>"]).int()
    return inputs


def oracle_sums(model: Any, prompts: PromptSet) -> dict[str, torch.Tensor]:
    """Name of a linear layer in transformers → weighted sum of its inputs' outer products."""
    if not hasattr(model.model, "visual"):
        watched = [Watched(model, token_weights(prompts))]
    else:
        text = Watched(model.model.language_model, token_weights(prompts))
        seen = [prompt.patches for prompt in prompts.prompts if prompt.patches]
        blocks = Watched(model.model.visual.blocks, even_weights(seen))
        merger = Watched(model.model.visual.merger, even_weights([count // 4 for count in seen]))
        head = Watched(nn.ModuleDict({"lm_head": model.lm_head}), token_weights(prompts))
        watched = [text, blocks, merger, head]
    with torch.inference_mode():
        for prompt in prompts.prompts:
            model(**oracle_inputs(prompt), use_cache=False)
    prefixes = ("model.language_model.", "model.visual.blocks.", "model.visual.merger.", "")
    named = zip(watched, prefixes if len(watched) > 1 else ("",), strict=True)
    return {f"{prefix}{name}": total for part, prefix in named for name, total in part.sums.items()}


def compare(found: Found, expected: dict[str, torch.Tensor], vlm: bool) -> set[str]:
    """Holds statistics to the oracle's; the paths that were compared."""
    compared = set()
    for path, statistics in found.items():
        name = tiny.published_name(f"{path}.weight", vlm).removesuffix(".weight")
        if name not in expected or path.startswith("mtp."):
            continue
        wanted = expected[name].numpy()
        assert statistics.hessian is not None
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(statistics.hessian, wanted, rtol=0, atol=2e-5 * scale, err_msg=path)
        np.testing.assert_allclose(statistics.mean_square, wanted.diagonal(), rtol=0, atol=2e-5 * scale, err_msg=path)
        compared.add(path)
    return compared


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_statistics_are_those_of_the_oracles_modules(kind: str, tmp_path: Path) -> None:
    folder = tiny.make_checkpoint(tmp_path / "source", kind)
    known = calibrating.opened(folder)
    prompts = calibrating.random_prompts(known.config)
    recorder, store = Recorder(), Store("float")
    open_folder(store, tmp_path / "work")
    rows = Plan({}, known.refs).rows
    stages = Stages(known.config, known.refs, prompts, rows, CPU).every
    assert Run(stages, known.refs, recorder, store, CPU).finish(NullProgress()) == 0
    model = transformers_model(folder)
    compared = compare(recorder.found, oracle_sums(model, prompts), kind == "vlm")
    linears = {path.removesuffix(".weight") for path, ref in known.refs.items() if len(ref.shape) > 1}
    assert set(recorder.found) == {path for path in linears if not path.endswith("embed_tokens")}
    left = {path for path in recorder.found if path.startswith("mtp.")} | {"vision_encoder.patch_embed.proj"}
    assert set(recorder.found) - compared <= left  # transformers has no draft head, and a convolution for patches
    if kind == "vlm":
        compare_draft(recorder.found, folder, prompts)
        patches = prompts.prompts[1].pixels
        assert patches is not None
        wanted = np.square(patches()).mean(0)
        np.testing.assert_allclose(recorder.found["vision_encoder.patch_embed.proj"].mean_square, wanted, rtol=1e-5)


def compare_draft(found: Found, folder: Path, prompts: PromptSet) -> None:
    """The draft head, which transformers has not, as the eager model runs it."""
    model = load_exaone(folder)
    assert model.mtp is not None
    weights = [row[:-1] for row in token_weights(prompts)]
    total = sum(float(row.sum()) for row in weights)
    watched = Watched(model.mtp, [row / total for row in weights])
    keep, cache = torch.zeros(1, dtype=torch.int64), model.decoder.empty_cache()[:1]
    with torch.inference_mode():
        for prompt in prompts.prompts:
            inputs = oracle_inputs(prompt)
            images = inputs.get("pixel_values"), inputs.get("image_grid_thw")
            embeds = model.embed(inputs["input_ids"], *images)
            _, hidden, _ = model(inputs["input_ids"], *images)
            mask = torch.ones_like(inputs["input_ids"][:, 1:])
            model.mtp(embeds[:, 1:], hidden[:, :-1], mask, cache, keep)
    for name, wanted in watched.sums.items():
        hessian = found[f"mtp.{name}"].hessian
        assert hessian is not None
        np.testing.assert_allclose(hessian, wanted.numpy(), rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["hybrid", "vlm"])
def test_every_module_sees_the_quantized_model_in_front_of_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs that weights were quantized for are those that transformers' modules get with these weights."""
    recipe = Recipe(
        "mixed",
        (
            Rule("vision_encoder.patch_embed.*", None),
            Rule("*.embed_tokens", Scheme(4, 32, method="search")),
            Rule("*.gate_proj", Scheme(4, 32, method="rtn")),
            Rule("*.layers.1.*", Scheme(8, 0, activations="int8", method="gptq")),
            Rule("*.layers.2.*", Scheme(4, 32, method="awq-gptq")),
            Rule("vision_encoder.*", Scheme(4, 32, method="search")),
            Rule("*", Scheme(4, 32, symmetric=False, method="gptq")),
        ),
    )
    folder = tiny.make_checkpoint(tmp_path / "source", kind, draft=False)
    prompts = calibrating.random_prompts(calibrating.opened(folder).config)
    calibration = Calibration(prompts)
    known = calibrating.opened(folder, recipe, calibration)
    found: Found = {}
    quantize = Plan.quantize

    def record(self: Plan, path: str, statistics: Statistics | None) -> Parts:
        if statistics is not None:
            found[path] = statistics
        return quantize(self, path, statistics)

    monkeypatch.setattr(Plan, "quantize", record)
    calibration.prepare(tmp_path / "work", known.config, known.refs, NullProgress())
    model = transformers_model(folder)
    restore(model, calibration, known, kind == "vlm")
    sums = oracle_sums(model, prompts)
    compared = compare({path: s for path, s in found.items() if s.hessian is not None}, sums, kind == "vlm")
    assert {
        "decoder.layers.3.mlp.down_proj",
        "decoder.layers.1.self_attn.q_proj",
        "decoder.layers.2.mlp.up_proj",
    } <= compared
    assert not any("gate_proj" in path for path in found)
    scaled = [calibration.store.read(path, INPUT_SCALE).view(np.float32) for path in compared if ".layers.2." in path]
    assert any(np.ptp(scale) > 0 for scale in scaled)


def restore(model: Any, calibration: Calibration, known: calibrating.Opened, vlm: bool) -> None:
    """Gives the oracle the weights that the quantized model has."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, values in calibrating.quantized_weights(calibration, known):
            parameters[tiny.published_name(f"{path}.weight", vlm)].copy_(torch.from_numpy(values))


def test_one_step_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = calibrating.opened(tiny.make_checkpoint(tmp_path / "source", "vlm"))
    prompts, store = calibrating.random_prompts(known.config), Store("float")
    open_folder(store, tmp_path / "work")
    loaded: list[weakref.ref[nn.Module]] = []
    load, most = Stage.load, 0

    def watched(self: Stage, refs: Refs, device: torch.device) -> nn.Module:
        nonlocal most
        assert not any(module() is not None for module in loaded), "a step's weights outlive it"
        module = load(self, refs, device)
        loaded.append(weakref.ref(module))
        files = [path for path in store.path(0, "", "").parent.iterdir() if path.suffix == ".states"]
        most = max(most, len(files))
        return module

    monkeypatch.setattr(Stage, "load", watched)
    stages = Stages(known.config, known.refs, prompts, Plan({}, known.refs).rows, CPU).every
    Run(stages, known.refs, Recorder(), store, CPU).finish(NullProgress())
    assert len(loaded) == len(stages) - 1  # looking tokens up loads nothing
    assert most <= 2  # those behind the last step, and the embeddings for the draft head
    assert not list(store.path(0, "", "").parent.glob("*.states"))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_table_has_the_rows_of_the_head_that_it_is_tied_to(method: str, tmp_path: Path) -> None:
    """But where these are scaled for the head's inputs, which are not what the table gives."""
    recipe = Recipe("tied", (Rule("*", Scheme(4, 32, symmetric=False, method=method)),))
    folder = tiny.make_checkpoint(tmp_path / "source", "dense")
    calibration = Calibration(calibrating.random_prompts(calibrating.opened(folder).config))
    known = calibrating.opened(folder, recipe, calibration)
    calibration.prepare(tmp_path / "work", known.config, known.refs, NullProgress())
    assert known.report is not None
    table, head = (
        next(weight for weight in known.report.weights if weight.path == f"decoder.{name}")
        for name in ("embed_tokens", "lm_head")
    )
    assert head.scheme is not None
    assert table.scheme is not None
    values = dict(calibrating.quantized_weights(calibration, known))
    assert head.scheme.method == method
    if method == "gptq":
        assert (head.shared_with, table.scheme) == (table.path, head.scheme)
        assert calibration._weights[table.path] is calibration._weights[head.path]
        return
    assert (head.shared_with, table.scheme.method) == ("", "search")
    assert table.reason == "its rows are looked up, not multiplied"
    weight = known.refs["decoder.lm_head.weight"].read()
    assert np.abs(values[head.path] - weight).max() < 0.25 * np.abs(weight).max()
