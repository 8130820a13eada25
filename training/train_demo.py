"""Trains the demonstration checkpoint on CPU cores or a GPU. See README.md beside this file."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from training.batches import STAGES, Batches
from training.losses import Auxiliary, losses, vision_loss
from training.shape import new_model
from training.state import State, restore, save

ENOUGH = (0.9, 0.8, 0.8, 0.85, 2.0)  # share of exact lines that ends each stage
GROUPS = 2  # groups of equal images a step
SAVE_SECONDS = 120


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where state and log go; an interrupted run goes on from there")
    parser.add_argument("--minutes", type=float, default=90, help="length of this run by the clock")
    parser.add_argument("--decay-minutes", type=float, default=30, help="the last of them, with a falling rate")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32, help="samples of one image size")
    parser.add_argument("--stage", type=int, help="start in this stage of the curriculum")
    parser.add_argument("--look", type=float, default=150, help="thousands of samples with a vision batch beside")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores")
    parser.add_argument("--seed", type=int, default=45)
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many")
    return parser.parse_args()


def learning_rate(options: argparse.Namespace, step: int, fading: float) -> float:
    """Warm-up by steps, then constant, then a cosine to zero over the last minutes."""
    warm = min(1.0, (step + 1) / 300)
    return float(options.rate * warm * (0.5 - 0.5 * math.cos(math.pi * fading)))


class Trainer:
    """One run: model, optimizer, data and counters."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.model = new_model(options.seed).to(self.device)
        self.heads = Auxiliary(self.model.config.text.hidden_size).to(self.device)
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
        self.state = restore(options.folder, self.model, self.heads, self.optimizer)
        if options.stage is not None:
            self.state.stage = options.stage
        self.batches = Batches(options.seed + self.state.step, options.batch)
        self.batches.set_stage(self.state.stage)
        self.sums: dict[str, tuple[float, int]] = {}
        self.logged = (self.state.samples, time.monotonic())

    def note(self, name: str, term: Tensor) -> None:
        """Adds to the averages the log shows."""
        total, count = self.sums.get(name, (0.0, 0))
        self.sums[name] = (total + float(term.detach()), count + 1)

    def step(self, fading: float) -> None:
        """One update; `fading` falls from 1 to 0 over the last minutes and takes rate and auxiliary losses with it."""
        options, state = self.options, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, state.step, fading)
        looking = state.samples < options.look * 1000 and fading > 0.5
        if looking:
            with torch.autocast(self.device.type, torch.bfloat16):
                term = vision_loss(self.model, self.heads, self.batches)
            (term * 0.7).backward()
            self.note("dense", term)
        weights = {"answer": 1.0, "characters": 0.5 * fading, "first": 0.25 * fading, "draft": 1.0}
        exact, groups = 0.0, 1 if looking else GROUPS
        for _ in range(groups):
            with torch.autocast(self.device.type, torch.bfloat16):
                draft = state.stage >= 3 and state.step % 3 == 0
                terms, share = losses(self.model, self.heads, self.batches().to(self.device), draft)
            torch.stack([term * weights[name] / GROUPS for name, term in terms.items()]).sum().backward()
            exact += share / groups
            for name, term in terms.items():
                self.note(name, term)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.samples += groups * options.batch
        state.exact += (exact - state.exact) * 0.02

    def log(self) -> None:
        """Appends a line of averages since the last one."""
        state, now = self.state, time.monotonic()
        shown = "  ".join(f"{name} {total / count:.3f}" for name, (total, count) in self.sums.items())
        speed = (state.samples - self.logged[0]) / (now - self.logged[1])
        line = (
            f"{state.seconds:7.0f} s  step {state.step:6}  stage {state.stage}  exact {100 * state.exact:5.1f} %  "
            f"{shown}  rate {self.optimizer.param_groups[0]['lr']:.2e}  {speed:.0f} samples/s"
        )
        with (self.options.folder / "log").open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        self.sums, self.logged = {}, (state.samples, now)

    def promote(self, fading: float) -> None:
        """Goes to the next stage once enough lines are exact, at the latest when the rate begins to fall."""
        state = self.state
        ready = state.exact > ENOUGH[state.stage] and state.step - state.entered > 100
        if state.stage < len(STAGES) - 1 and (ready or fading < 0.97):
            state.stage, state.entered, state.exact = state.stage + 1, state.step, 0.0
            self.batches.set_stage(state.stage)

    def save(self) -> None:
        """Writes the state."""
        save(self.options.folder, self.model, self.heads, self.optimizer, self.state)


def main() -> None:
    """Runs until the time is over."""
    options = arguments()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options)
    state: State = trainer.state
    begin = saved = time.monotonic()
    before, end = state.seconds, begin + options.minutes * 60
    while (left := end - time.monotonic()) > 0 and state.step < options.steps:
        fading = min(1.0, left / (60 * options.decay_minutes))
        trainer.step(fading)
        now = time.monotonic()
        state.seconds = before + now - begin
        if state.step % 100 == 0:
            trainer.log()
        trainer.promote(fading)
        if now - saved > SAVE_SECONDS:
            trainer.save()
            saved = now
    trainer.save()


if __name__ == "__main__":
    main()
