"""Training for a few steps: it learns, saves, goes on where it stopped, exports, and makes a checkpoint larger."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exaone_export.demo import checkpoint_folder
from exaone_export.demo.tasks import LEVELS
from model.exaone import Exaone
from model.load import load_exaone
from training import export_demo, train_demo
from training.batches import Batch, Batches
from training.forward import decode
from training.losses import Auxiliary, embedded, losses
from training.shape import CONFIG, UNUSED, grown_model, new_model
from training.state import Average


@pytest.mark.slow
def test_training_saves_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        train_demo.main() if arguments[0] == "--batch" else export_demo.main()

    start = ("--start", str(checkpoint_folder()))
    for steps in ("2", "3"):
        run("--batch", "2", "--minutes", "1", "--steps", steps, *start, str(tmp_path))
        assert json.loads((tmp_path / "state.json").read_text())["step"] == int(steps)
    run(str(tmp_path / "state.safetensors"), str(tmp_path / "checkpoint"))
    assert load_exaone(tmp_path / "checkpoint").mtp is not None


@pytest.mark.parametrize("task", LEVELS)
def test_a_batch_of_each_task_is_learnt(task: str) -> None:
    torch.manual_seed(0)
    model = new_model(1)
    heads = Auxiliary(model.config.text.hidden_size)
    batch = Batches(2, 2).batch(task, 0)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3)
    found = []
    for _ in range(6):
        terms, exact = losses(model, heads, batch, draft=True)
        assert exact.shape == (2,)
        sum(terms.values(), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(term.detach()) for name, term in terms.items()})
    assert all(found[-1][name] < found[0][name] for name in ("answer", "draft"))


def smaller(folder: Path) -> Path:
    """An untrained checkpoint of the same widths with half of the decoder's layers and fewer tokens."""
    config = copy.deepcopy(CONFIG)
    layers = config["text_config"]["num_hidden_layers"] // 2
    config["text_config"] |= {"num_hidden_layers": layers, "vocab_size": UNUSED + 1}
    config["text_config"]["layer_types"] = CONFIG["text_config"]["layer_types"][:layers]
    folder.mkdir()
    save_file(export_demo.published_tensors(new_model(5, config)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: Exaone, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.decoder.lm_head(decode(model.decoder, embedded(model, batch)[0], 0)[0])
    return found


def test_a_grown_model_answers_as_the_smaller_one(tmp_path: Path) -> None:
    folder = smaller(tmp_path / "smaller")
    model, small = grown_model(folder, 3), load_exaone(folder)
    assert model.config.text.num_layers == CONFIG["text_config"]["num_hidden_layers"]
    batch = Batches(4, 8, held_out=True).batch("line", 0)
    plain, grown = logits(small, batch), logits(model, batch)
    assert (grown[..., : UNUSED + 1] - plain).std() < 0.1 * plain.std()
    assert torch.equal(grown[..., UNUSED + 1 :], grown[..., UNUSED, None].expand_as(grown[..., UNUSED + 1 :]))
    for layer in model.decoder.layers[small.config.text.num_layers :]:
        for name, parameter in layer.named_parameters():
            if name.startswith("post_"):
                parameter.data.zero_()
    assert (logits(model, batch)[..., : UNUSED + 1] - plain).abs().max() < 1e-4


def test_averages_move_and_swap() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = Average(module)
    module.weight.data.fill_(1.0)
    average.update(0.25)
    average.swap()
    assert module.weight.item() == 0.25
    average.swap()
    assert module.weight.item() == 1.0
