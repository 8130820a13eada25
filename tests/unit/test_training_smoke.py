"""Training for a few steps: it learns, saves, goes on where it stopped, exports, and makes a checkpoint larger."""

import json
import sys
from pathlib import Path

import pytest
import torch

from exaone_export.demo import checkpoint_folder
from exaone_export.demo.tasks import LEVELS
from model.load import load_exaone
from training import export_demo, train_demo
from training.batches import Batches
from training.losses import Auxiliary, losses
from training.shape import CONFIG, grown_model, new_model
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


def test_a_grown_model_answers_as_the_smaller_one() -> None:
    folder = checkpoint_folder()
    model, small = grown_model(folder, 3), load_exaone(folder)
    assert model.config.text.num_layers == CONFIG["text_config"]["num_hidden_layers"]
    heads = Auxiliary(model.config.text.hidden_size)
    with torch.no_grad():
        for task in ("line", "copy"):
            batch = Batches(4, 8, held_out=True).batch(task, 0)
            grown, plain = (losses(one, heads, batch, draft=False) for one in (model, small))
            assert torch.equal(grown[1], plain[1])
            assert abs(float(grown[0]["answer"] - plain[0]["answer"])) < 0.02


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
