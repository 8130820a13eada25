"""One random checkpoint as each engine wants it, made with the engine's own tools where it has any."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers_envs import Environments, logged
from benchmarks.peers_twin import as_qwen3, with_tokenizer

HERE = Path(__file__).resolve().parent
BASELINE = "llama.cpp Q4_0"
RECIPES = ("int4", "int8", "int8-dynamic")


@dataclass(frozen=True)
class Contender:
    """An engine with one of its files.

    Attributes:
        name: in the table.
        kind: what `peers_worker.py` calls the engine.
        python: of its environment.
        model: a file or a folder.
    """

    name: str
    kind: str
    python: Path
    model: Path

    @property
    def megabytes(self) -> float:
        """Size of its files, tokenizers and notes left out."""
        files = [self.model] if self.model.is_file() else [p for p in self.model.iterdir() if p.is_file()]
        kept = (path for path in files if "tokenizer" not in path.name)
        return sum(path.stat().st_size for path in kept) / 1e6


class Models:
    """Makes models in a folder when they are asked for; what is there is used.

    Args:
        checkpoint: of the EXAONE 4.0 kind, in bfloat16.
        folder: for the models.
        environments: of the other engines.
        logs: folder for what their tools print.
    """

    def __init__(self, checkpoint: Path, folder: Path, environments: Environments, logs: Path) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._environments = environments
        self._logs = logs

    def ours(self, recipe: str) -> Contender:
        """A bundle of ours; `recipe` is a name or a file."""
        name = Path(recipe).stem
        command = [sys.executable, "-m", "exaone_export", "export", str(self._checkpoint)]

        def make(out: Path) -> None:
            logged([*command, str(out), "--quantize", recipe], self._logs / f"ours-{name}.log")

        return self.bundle(name, self._made(f"ours-{name}", make))

    @staticmethod
    def bundle(name: str, folder: Path) -> Contender:
        """A bundle that is there already."""
        return Contender(f"exaone-export {name}", "ours", Path(sys.executable), folder)

    def llama(self, kind: str) -> Contender:
        """llama.cpp's file of a type."""
        python = self._environments.python("llama")

        def make(out: Path) -> None:
            scratch = out.with_suffix(".folder")
            command = [str(python), str(HERE / "peers_gguf.py"), str(self._checkpoint), str(scratch), kind]
            logged(command, self._logs / f"llama-{kind}.log")
            (scratch / f"{kind}.gguf").rename(out)
            scratch.rmdir()

        return Contender(f"llama.cpp {kind}", "llama", python, self._made(f"{kind}.gguf", make))

    def genai(self, kind: str, block: int) -> Contender:
        """onnxruntime-genai's model builder, on a twin of the same dimensions: it does not know EXAONE."""
        runner = self._environments.python("genai")
        name = f"genai-{kind}-{block}"

        def make(out: Path) -> None:
            twin = self._made("twin-qwen3", partial(as_qwen3, self._checkpoint))
            options = [f"block_size={block}", "accuracy_level=4", "shared_embeddings=true", "prune_lm_head=true"]
            command = [
                str(self._environments.python("genai-build")), "-m", "onnxruntime_genai.models.builder",
                "-m", str(twin), "-o", str(out), "-p", kind, "-e", "cpu", "-c", str(self._folder / "cache"),
                "--extra_options", *options,
            ]  # fmt: skip
            logged(command, self._logs / f"{name}.log")

        title = f"onnxruntime-genai {kind} block {block} (twin)"
        return Contender(title, "genai", runner, self._made(name, make))

    def openvino(self) -> Contender:
        """optimum-intel's export, int4 in groups of 128 with its defaults for the rest."""
        runner = self._environments.python("ov")

        def make(out: Path) -> None:
            source = self._made("with-tokenizer", partial(with_tokenizer, self._checkpoint))
            tool = self._environments.python("ov-build").with_name("optimum-cli")
            command = [
                str(tool), "export", "openvino", "-m", str(source), "--task", "text-generation-with-past",
                "--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0", str(out),
            ]  # fmt: skip
            logged(command, self._logs / "openvino.log")

        return Contender("OpenVINO GenAI int4 g128", "openvino", runner, self._made("openvino-int4-128", make))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """What `make` puts at a path, once; an unfinished one is begun anew."""
        path, unfinished = self._folder / name, self._folder / f"partial-{name}"
        if not path.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            if unfinished.is_file():
                unfinished.unlink()
            for left in (unfinished, unfinished.with_suffix(".folder")):
                shutil.rmtree(left, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
        return path


def all_contenders(models: Models) -> dict[str, Callable[[], Contender]]:
    """Short name → how to get it; nothing is made before that."""
    recipes = [name for name in RECIPES if (HERE.parent / "quantize" / "recipes" / f"{name}.toml").exists()]
    found: dict[str, Callable[[], Contender]] = {f"ours-{name}": partial(models.ours, name) for name in recipes}
    found |= {f"llama-{kind}": partial(models.llama, kind) for kind in ("Q4_0", "Q4_K_M", "Q8_0")}
    for kind, block in (("int4", 32), ("int4", 128), ("int8", 32)):
        found[f"genai-{kind}-{block}"] = partial(models.genai, kind, block)
    return found | {"openvino": models.openvino}
