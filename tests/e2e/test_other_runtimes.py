"""Stock runtimes on the folders that export writes: onnxruntime-genai, plain onnxruntime and transformers.js, each in
a process without a line of ours, give the greedy tokens that our own runtime gives.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import exaone_export as ee
from model.bundle import file_sha256, read_manifest
from tests import runtimes
from tests.e2e.conftest import Bundles
from tests.tiny import SPECIAL

WINDOW, SLACK = 8, 64
GREEDY = ee.GenerationOptions(do_sample=False)
IMAGE, END = SPECIAL["<|image_pad|>"], SPECIAL["<|endofturn|>"]
QUESTION = "What is seen here? 무엇이 보이나요?"
SIZES = {"none": [], "small": [(28, 28)], "odd": [(140, 476)], "two": [(112, 168), (196, 84)], "scaled": [(100, 333)]}
"""Height and width of images: grids of 2x2, 10x34, 8x12 and 14x6 patches, and one that is scaled to fit."""


def words(count: int) -> list[int]:
    return np.random.default_rng(count).integers(100, 500, count).tolist()


def pictures(name: str) -> list[Image.Image]:
    sizes = enumerate(SIZES[name])
    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)) for i, size in sizes]


def saved(name: str, folder: Path) -> list[Path]:
    paths = [folder / f"{name} {i}.png" for i in range(len(SIZES[name]))]
    for image, path in zip(pictures(name), paths, strict=True):
        image.save(path)
    return paths


def ours(bundle: Path, name: str, new: int) -> list[int]:
    with ee.Engine.load(bundle) as engine:
        return engine.generate(QUESTION, pictures(name), options=GREEDY, max_new_tokens=new).token_ids


@pytest.fixture(scope="module")
def other(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bundles of a kind with options of export, quantized afterwards, each made once."""
    made: dict[str, Path] = {}

    def make(kind: str, recipe: str = "none", **options: Any) -> Path:
        key = json.dumps([kind, recipe, options], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("other") / kind
            if recipe == "none":
                ee.export(bundles.source(kind), made[key], **options)
            else:
                ee.quantize(make(kind, **options), made[key], recipe=recipe)
        return made[key]

    return make


# optimum


def test_optimum_makes_the_same_bundle(bundles: Bundles, tmp_path: Path) -> None:
    """`optimum-cli export exaone`, which finds our command in its namespace folder."""
    pytest.importorskip("optimum")
    command = Path(sysconfig.get_path("scripts")) / "optimum-cli"
    out, wanted = tmp_path / "out", bundles.bundle("dense", "int8")
    runtimes.run(command, "export", "exaone", "-m", bundles.source("dense"), out, "--quantize", "int8", "--quiet")
    for name in read_manifest(wanted).files:
        assert file_sha256(out / name) == file_sha256(wanted / name), name


# onnxruntime-genai


def genai(bundle: Path, cases: list[dict[str, object]], folder: Path) -> list[list[int]]:
    python = runtimes.python_with("genai", "onnxruntime_genai")
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = runtimes.ROOT / "tests" / "genai_worker.py"
    found = json.loads(runtimes.run(python, "-P", worker, bundle, folder / "cases.json", cwd=folder))
    assert found["foreign"] == []
    answers: list[list[int]] = found["answers"]
    return answers


def without_end(ids: list[int]) -> list[int]:
    """onnxruntime-genai keeps the token that ends an answer to itself."""
    return ids[:-1] if ids[-1] == END else ids


@pytest.mark.parametrize("recipe", ["none", "int8", "int4"])
@pytest.mark.parametrize("kind", ["hybrid", "dense", "vlm"])
def test_genai_reads_text(bundles: Bundles, kind: str, recipe: str, tmp_path: Path) -> None:
    """Prompts shorter than the window, of just its length, and far beyond what its buffer holds."""
    runtimes.python_with("genai", "onnxruntime_genai")
    bundle = bundles.bundle(kind, recipe)
    prompts = [words(length) for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + SLACK, WINDOW + SLACK + 1, 300)]
    found = genai(bundle, [{"ids": ids, "new": 90, "patches": None} for ids in prompts], tmp_path)
    with ee.Engine.load(bundle) as engine:
        wanted = [engine.generate_ids(ids, options=GREEDY, max_new_tokens=90).token_ids for ids in prompts]
    wanted = [without_end(ids) for ids in wanted]
    assert found == wanted
    assert max(map(len, wanted)) > WINDOW + SLACK


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_genai_sees_images(bundles: Bundles, recipe: str, tmp_path: Path) -> None:
    """The vision encoder's graph through named tensors: odd grids, two images of different sizes, none at all."""
    runtimes.python_with("genai", "onnxruntime_genai")
    bundle = bundles.bundle("vlm", recipe)
    cases: list[dict[str, object]] = []
    wanted = []
    with ee.Engine.load(bundle) as engine:
        for name in SIZES:
            ids, parts = words(4), []
            for i, image in enumerate(pictures(name)):
                values, grid = engine.requests.image_processor(image)
                parts.append((values, grid))
                ids += [IMAGE] * (int(grid.prod()) // 4) + words(3 + i)
            file = tmp_path / f"{name}.npz"
            if parts:
                pixels, grids = (np.concatenate(part) for part in zip(*parts, strict=True))
                count = np.array([ids.count(IMAGE)], np.int64)
                np.savez(file, pixel_values=pixels, image_grid_thw=grids, num_image_tokens=count)
            cases.append({"ids": ids, "new": 90, "patches": str(file) if parts else None})
            result = engine.generate_ids(ids, pictures(name), options=GREEDY, max_new_tokens=90)
            wanted.append(without_end(result.token_ids))
    assert genai(bundle, cases, tmp_path) == wanted
    assert max(map(len, wanted)) > WINDOW + SLACK


@pytest.mark.parametrize("name", ["none", "two", "scaled"])
def test_the_example_with_genai(bundles: Bundles, name: str, tmp_path: Path) -> None:
    python = runtimes.python_with("genai", "onnxruntime_genai")
    bundle = bundles.bundle("vlm")
    example = runtimes.EXAMPLES / "with_genai.py"
    found = json.loads(runtimes.run(python, "-P", example, bundle, QUESTION, *saved(name, tmp_path), cwd=tmp_path))
    assert found["token_ids"] == without_end(ours(bundle, name, 128))


def test_genai_reads_full_caches_and_is_given_none_of_integers(other: Callable[..., Path], tmp_path: Path) -> None:
    assert not (other("hybrid", kv_cache="int8") / "genai_config.json").exists()
    runtimes.python_with("genai", "onnxruntime_genai")
    bundle = other("hybrid", kv_cache="full")
    with ee.Engine.load(bundle) as engine:
        wanted = engine.generate_ids(words(100), options=GREEDY, max_new_tokens=90).token_ids
    assert genai(bundle, [{"ids": words(100), "new": 90, "patches": None}], tmp_path) == [without_end(wanted)]


# Wrong arguments


def wrong_arguments(example: Path, command: list[str], folder: Path) -> None:
    """One line and the exit code of exaone-export, never a traceback."""
    there = folder / "there"
    there.mkdir()
    for arguments, code in (
        ([], 2), ([there], 2), (["nowhere", "hi"], 4), ([there, "hi"], 4), ([there, "hi", "none.png"], 2),
        ([example, "hi"], 4),
    ):  # fmt: skip
        done = subprocess.run(
            [*command, str(example), *map(str, arguments)], capture_output=True, text=True, cwd=folder
        )
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        *before, last = done.stderr.splitlines()  # libraries may warn before, as of a GPU that they do not find
        assert last.startswith("error: give a BUNDLE ")
        assert not any(line.startswith(("error:", "Traceback", "  ")) for line in before)


@pytest.mark.parametrize(
    ("name", "environment", "module"),
    [("plain_onnxruntime.py", "plain", "onnxruntime"), ("with_genai.py", "genai", "onnxruntime_genai")],
)
def test_examples_say_what_they_want(name: str, environment: str, module: str, tmp_path: Path) -> None:
    python = runtimes.python_with(environment, module)
    wrong_arguments(runtimes.EXAMPLES / name, [str(python), "-P"], tmp_path)


def test_the_example_for_node_says_what_it_wants(script: Path, tmp_path: Path) -> None:
    wrong_arguments(script, ["node"], tmp_path)


# Plain onnxruntime

_ALONE = """
import runpy, sys
refused = ("exaone_export", "exporter", "model", "quantize", "runtime", "torch", "transformers", "optimum", "onnx")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ImportError(f"{name} is not to be used here")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
seen = runpy.run_path(sys.argv[0])
assert not {name.partition(".")[0] for name in sys.modules} & set(refused)
print(seen["found"])
"""


def plain(bundle: Path, images: list[Path], folder: Path) -> list[int]:
    python = runtimes.python_with("plain", "onnxruntime")
    example = runtimes.EXAMPLES / "plain_onnxruntime.py"
    printed = runtimes.run(python, "-P", "-c", _ALONE, example, bundle, QUESTION, *images, cwd=folder)
    ids: list[int] = json.loads(printed.splitlines()[-1])
    return ids


def test_the_plain_example_is_short() -> None:
    text = (runtimes.EXAMPLES / "plain_onnxruntime.py").read_text()
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("kind", ["hybrid", "dense"])
def test_plain_onnxruntime_reads_text(bundles: Bundles, kind: str, tmp_path: Path) -> None:
    bundle = bundles.bundle(kind, "int4")
    assert plain(bundle, [], tmp_path) == ours(bundle, "none", 128)


@pytest.mark.parametrize("name", ["none", "odd", "two", "scaled"])
def test_plain_onnxruntime_sees_images(bundles: Bundles, name: str, tmp_path: Path) -> None:
    bundle = bundles.bundle("vlm")
    assert plain(bundle, saved(name, tmp_path), tmp_path) == ours(bundle, name, 128)


def test_plain_onnxruntime_reads_half_precision(other: Callable[..., Path], tmp_path: Path) -> None:
    bundle = other("vlm", dtype="fp16")
    assert plain(bundle, saved("two", tmp_path), tmp_path) == ours(bundle, "two", 128)


@pytest.mark.parametrize("cache", ["int8", "full"])
def test_plain_onnxruntime_reads_other_caches(other: Callable[..., Path], cache: str, tmp_path: Path) -> None:
    bundle = other("hybrid", kv_cache=cache)
    assert plain(bundle, [], tmp_path) == ours(bundle, "none", 128)


def test_plain_onnxruntime_reads_the_other_layout(other: Callable[..., Path], tmp_path: Path) -> None:
    bundle = other("vlm", layout="transformersjs")
    assert plain(bundle, saved("two", tmp_path), tmp_path) == ours(bundle, "two", 128)


def test_the_other_layout_is_a_bundle_like_any(
    bundles: Bundles, other: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = other("vlm", layout="transformersjs")
    assert ours(bundle, "two", 60) == ours(bundles.bundle("vlm"), "two", 60)
    assert ee.verify(bundle, source=bundles.source("vlm")).ok
    assert not caplog.records  # no file that is not listed
    assert {graph.file for graph in ee.inspect(bundle).graphs} == {
        "onnx/vision_encoder.onnx", "onnx/embed_tokens.onnx", "onnx/decoder_model_merged.onnx",
    }  # fmt: skip
    assert "--layout transformersjs" in (bundle / "README.md").read_text()
    (bundle / "onnx" / "stray.bin").touch()
    ee.verify(bundle)
    assert "onnx/stray.bin is not part of the bundle" in caplog.text
    (bundle / "onnx" / "stray.bin").unlink()


# transformers.js


@pytest.fixture
def script() -> Path:
    """The example where its packages are found: Node looks for them beside the script."""
    folder = runtimes.node_folder()
    path = folder / "generate.mjs"
    path.write_bytes((runtimes.EXAMPLES / "node" / "generate.mjs").read_bytes())
    return path


def node(script: Path, bundle: Path, images: list[Path]) -> list[int]:
    printed = runtimes.run("node", script, bundle, QUESTION, *images, NEW_TOKENS="90")
    ids: list[int] = json.loads(printed.splitlines()[-1])["token_ids"]
    return ids


@pytest.mark.parametrize("recipe", ["none", "int8", "int4"])
def test_transformers_js_reads_text(
    script: Path, bundles: Bundles, other: Callable[..., Path], recipe: str, tmp_path: Path
) -> None:
    bundle = other("hybrid", recipe, layout="transformersjs")
    assert node(script, bundle, []) == ours(bundles.bundle("hybrid", recipe), "none", 90)


@pytest.mark.parametrize("name", ["none", "odd", "two"])
def test_transformers_js_sees_images(
    script: Path, bundles: Bundles, other: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    bundle = other("vlm", layout="transformersjs")
    assert "mtp" not in {graph.name for graph in read_manifest(bundle).graphs}
    assert node(script, bundle, saved(name, tmp_path)) == ours(bundles.bundle("vlm"), name, 90)


# Of every graph by itself: AutoModel takes a class that it does not know for an encoder, and is told the file.
_FEATURES = """
import { AutoImageProcessor, AutoModel, AutoTokenizer, RawImage, cat, env, pipeline } from '@huggingface/transformers';
env.allowRemoteModels = false;
const [bundle, task, text, token, ...paths] = process.argv.slice(2);
const load = (name) => AutoModel.from_pretrained(bundle, { model_file_name: name });
const media = async () => {
  const prepare = await AutoImageProcessor.from_pretrained(bundle);
  const images = [];
  for (const path of paths) images.push(await prepare(await RawImage.read(path)));
  const [pixel_values, image_grid_thw] = ['pixel_values', 'image_grid_thw'].map((n) => cat(images.map((i) => i[n]), 0));
  return (await (await load('vision_encoder'))({ pixel_values, image_grid_thw })).image_features;
};
const told = (tensor) => console.log(JSON.stringify(tensor.tolist()));
if (task === 'text') {
  told((await (await pipeline('feature-extraction', bundle))(text)));
} else if (task === 'image') {
  told(await media());
} else {
  const features = await media();
  const { input_ids, attention_mask } = (await AutoTokenizer.from_pretrained(bundle))(text);
  const { inputs_embeds } = await (await load('embed_tokens'))({ input_ids });
  const width = inputs_embeds.dims[2];
  let next = 0;
  input_ids.data.forEach((id, at) => {
    if (id !== BigInt(token)) return;
    inputs_embeds.data.set(features.data.subarray(next * width, ++next * width), at * width);
  });
  told((await (await load('decoder_model_merged'))({ inputs_embeds, attention_mask })).last_hidden_state);
}
"""


def features_in_node(folder: Path, bundle: Path, task: str, text: str, images: list[Path]) -> np.ndarray:
    path = folder / "features.mjs"
    path.write_text(_FEATURES)
    printed = runtimes.run("node", path, bundle, task, text, str(IMAGE), *images)
    return np.array(json.loads(printed.splitlines()[-1]), np.float32)


@pytest.mark.parametrize("recipe", ["none", "int8"])
def test_transformers_js_takes_features_of_text(other: Callable[..., Path], recipe: str) -> None:
    folder = runtimes.node_folder()
    bundle = other("hybrid", recipe, layout="transformersjs", task="feature-extraction")
    found = features_in_node(folder, bundle, "text", 5 * QUESTION, [])  # several windows
    with ee.load(bundle) as encoder:
        assert isinstance(encoder, ee.Encoder)
        np.testing.assert_allclose(found[0], encoder.features(5 * QUESTION), atol=1e-5)


def test_transformers_js_takes_features_of_images(other: Callable[..., Path], tmp_path: Path) -> None:
    folder, paths = runtimes.node_folder(), saved("two", tmp_path)
    bundle = other("vlm", layout="transformersjs", task="image-feature-extraction")
    with ee.load(bundle) as encoder:
        assert isinstance(encoder, ee.Encoder)
        wanted = np.concatenate(encoder.image_features(pictures("two")))
    np.testing.assert_allclose(features_in_node(folder, bundle, "image", "", paths), wanted, atol=1e-4)


def test_transformers_js_takes_features_of_both(other: Callable[..., Path], tmp_path: Path) -> None:
    folder, paths = runtimes.node_folder(), saved("two", tmp_path)
    bundle, pad = other("vlm", layout="transformersjs", task="feature-extraction"), "<|image_pad|>"
    with ee.load(bundle) as encoder:
        assert isinstance(encoder, ee.Encoder)
        wanted = encoder.features(f"{pad} and {pad}: which?", pictures("two"))
    counts = [height * width // 28**2 for height, width in SIZES["two"]]
    text = f"{counts[0] * pad} and {counts[1] * pad}: which?"
    np.testing.assert_allclose(features_in_node(folder, bundle, "both", text, paths)[0], wanted, atol=1e-4)
