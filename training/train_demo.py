"""Trains the demonstration checkpoint on CPU cores or a GPU. See README.md beside this file."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from exaone_export.demo.tasks import LEVELS
from training.batches import Batches
from training.losses import Auxiliary, losses, vision_loss
from training.shape import grown_model, new_model
from training.state import Average, State, restore, save

# Share of exact samples that ends a level; of other tasks:
ENOUGH = {"line": (0.9, 0.8, 0.8, 0.85), "question": (0.7, 0.7, 0.7)}
ENOUGH_ELSE = 0.6
PRACTICE = 1000  # samples of a task at a level, at least
READS_LINES = 3  # level of lines from which the other tasks are practised
AVERAGED = 0.01  # share of the present weights in their average, a step
SAVE_SECONDS, LOG_SECONDS, HELD_OUT_SECONDS = 120, 60, 400
HELD_OUT_BATCHES = 8
WEIGHTS = "line=.19,copy=.02,receipt=.29,question=.2,two=.1,find=.2"


def weights(text: str) -> dict[str, float]:
    """How often each task is practised, from `line=.2,...`."""
    found = {name: float(value) for name, value in (part.split("=") for part in text.split(","))}
    if unknown := set(found) - set(LEVELS):
        raise argparse.ArgumentTypeError(f"no such task: {', '.join(sorted(unknown))}")
    return found


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where state and log go; an interrupted run goes on from there")
    parser.add_argument("--start", type=Path, help="begin with a smaller checkpoint that reads lines, made larger")
    parser.add_argument("--minutes", type=float, default=90, help="length of this run in minutes of processor time")
    parser.add_argument("--decay-minutes", type=float, default=0, help="the last of them, with a falling rate")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=16, help="samples of one task and image size")
    parser.add_argument("--groups", type=int, default=2, help="batches a step")
    parser.add_argument("--weights", type=weights, default=weights(WEIGHTS), help="how often each task is practised")
    parser.add_argument("--look", type=float, default=0, help="thousands of lines with a vision batch beside")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores")
    parser.add_argument("--seed", type=int, default=45)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many")
    return parser.parse_args()


def learning_rate(options: argparse.Namespace, step: int, fading: float) -> float:
    """Warm-up by steps, then constant, then a cosine to zero over the last minutes."""
    warm = min(1.0, (step + 1) / 200)
    return float(options.rate * warm * (0.5 - 0.5 * math.cos(math.pi * fading)))


def seconds_used(device: torch.device) -> float:
    """What the schedule goes by: processor time, as the run may be stopped now and then; on a GPU the clock."""
    return time.process_time() if device.type == "cpu" else time.monotonic()


class Trainer:
    """One run: model, optimizer, data and counters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        model = grown_model(options.start, options.seed) if options.start else new_model(options.seed)
        self.model = model.to(self.device)
        self.heads = Auxiliary(self.model.config.text.hidden_size).to(self.device)
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
        self.average = Average(self.model)
        self.state = restore(options.folder, self.model, self.heads, (self.average, self.optimizer)) or State(
            levels=dict.fromkeys(LEVELS, 0) | {"line": len(LEVELS["line"]) - 1 if options.start else 0}
        )
        self.batches = Batches(options.seed + self.state.step, options.batch)
        self.sums: dict[str, tuple[float, int]] = {}

    def note(self, name: str, term: Tensor) -> None:
        """Adds to the averages the log shows."""
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(term.detach()), count + 1)

    def step(self, fading: float) -> None:
        """One update; `fading` falls from 1 to 0 over the last minutes and takes rate and auxiliary losses with it."""
        options, state = self.options, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, state.step, fading)
        if state.samples.get("line", 0) < options.look * 1000 and fading > 0.5:
            with torch.autocast(self.device.type, torch.bfloat16):
                term = vision_loss(self.model, self.heads, self.batches.dense().to(self.device))
            (term * 0.7).backward()
            self.note("dense", term)
        scale = {"answer": 1.0, "characters": 0.5 * fading, "first": 0.25 * fading, "line": 0.25 * fading, "draft": 1.0}
        for _ in range(options.groups):
            task = self.batches.choose(options.weights) if state.levels["line"] >= READS_LINES else "line"
            batch = self.batches.batch(task, state.levels[task]).to(self.device)
            draft = state.levels["line"] >= READS_LINES and state.step % 3 == 0
            with torch.autocast(self.device.type, torch.bfloat16):
                terms, exact = losses(self.model, self.heads, batch, draft)
            torch.stack([term * scale[name] / options.groups for name, term in terms.items()]).sum().backward()
            self.count(task, float(exact.float().mean()))
            for name, term in terms.items():
                self.note(f"{name} {task}" if name == "answer" else name, term)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.average.update(max(AVERAGED, 1 / (1 + state.step)))

    def count(self, task: str, exact: float) -> None:
        """Counts a batch of a task, and goes to the next level once enough samples are exact."""
        state = self.state
        state.samples[task] = state.samples.get(task, 0) + self.options.batch
        level, before = state.levels[task], state.exact.get(task, 0.0)
        state.exact[task] = before + (exact - before) * 0.03
        enough = ENOUGH[task][level : level + 1] if task in ENOUGH else (ENOUGH_ELSE,)
        practised = state.samples[task] - state.entered.get(task, 0) >= PRACTICE
        if practised and level < len(LEVELS[task]) - 1 and state.exact[task] > enough[0]:
            state.levels[task], state.exact[task], state.entered[task] = level + 1, 0.0, state.samples[task]

    def write(self, line: str) -> None:
        """Appends a line to the log."""
        with (self.options.folder / "log").open("a", encoding="utf-8") as log:
            log.write(f"{self.state.seconds:7.0f} s  step {self.state.step:6}  {line}\n")

    def log(self) -> None:
        """Appends the averages since the last time."""
        state = self.state
        tasks = (
            f"{task} {level}:{100 * state.exact.get(task, 0):.0f}%/{state.samples.get(task, 0) / 1000:.1f}k"
            for task, level in state.levels.items()
        )
        shown = (f"{name} {total / count:.3f}" for name, (total, count) in sorted(self.sums.items()))
        self.write(f"{'  '.join(tasks)}  |  {'  '.join(shown)}  rate {self.optimizer.param_groups[0]['lr']:.1e}")
        self.sums = {}

    def held_out(self, tasks: Iterable[str]) -> None:
        """Logs the share of exact held-out samples of each task's last level, by the averaged weights."""
        batches, found = Batches(7, 8, held_out=True), []
        self.average.swap()
        for task in tasks:
            right = []
            for _ in range(HELD_OUT_BATCHES):
                batch = batches.batch(task, len(LEVELS[task]) - 1).to(self.device)
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                    right.append(losses(self.model, self.heads, batch, draft=False)[1])
            share = float(torch.cat(right).float().mean())
            found.append(f"{task} {100 * share:.0f}%")
        self.average.swap()
        self.write("held out, hardest level: " + "  ".join(found))

    def save(self) -> None:
        """Writes the state."""
        save(self.options.folder, self.model, self.heads, (self.average, self.optimizer, self.state))


def main() -> None:
    """Runs until the time is over, or the process is told to end; saves either way."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    state, device = trainer.state, trainer.device
    signal.signal(signal.SIGTERM, lambda *_: setattr(options, "steps", 0))
    begin = saved = logged = tested = seconds_used(device)
    before, end = state.seconds, begin + options.minutes * 60
    while (left := end - seconds_used(device)) > 0 and state.step < options.steps:
        fading = min(1.0, left / (60 * options.decay_minutes)) if options.decay_minutes else 1.0
        trainer.step(fading)
        now = seconds_used(device)
        state.seconds = before + now - begin
        if now - logged > LOG_SECONDS:
            trainer.log()
            logged = now
        if now - tested > HELD_OUT_SECONDS:
            trainer.held_out(options.weights)
            tested = seconds_used(device)
        if now - saved > SAVE_SECONDS:
            trainer.save()
            saved = now
    trainer.save()


if __name__ == "__main__":
    main()
