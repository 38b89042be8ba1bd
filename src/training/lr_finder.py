"""Learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186)."""

import sys
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
from tqdm import tqdm

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.devices import explain_out_of_memory, make_trainer
from src.training.module import YOLOv3Module

RADIUS = 7  # steps before and after, of the running mean
DIVERGENCE = 1.5  # the test ends at this multiple of the lowest loss
FALL_FRACTION = 0.9  # of the loss's fall, at the suggested rate


@dataclass(frozen=True)
class LRFinderResult:
    """Learning rates, the smoothed loss at each up to divergence, and the suggested peak."""

    rates: list[float]
    losses: list[float]
    suggestion: float


@explain_out_of_memory
def find_lr(config: Config, data: DetectionDataModule, steps: int = 100) -> LRFinderResult:
    """Train a separate network at rates that rise from 1e-5 to 0.1; suggest a peak for OneCycle.

    The suggestion is the rate at which 90 % of the loss's fall has happened, shortly before
    divergence; lower and higher peaks are compared in benchmarks/RECIPE.md. Lightning's finder is
    not used: it suggests the rate of steepest descent, which is lower, and its smoothing (2 % per
    step) is too slow for 100 steps. The test runs on one device and accumulates gradients to the
    effective batch of all devices. Raises RuntimeError if the loss never falls.
    """
    config = data.check_matches(config)
    test = RangeTest(np.geomspace(1e-5, 0.1, steps))
    accumulate = config.accumulate_grad_batches * config.devices
    one_device = config.replace(devices=1, accumulate_grad_batches=accumulate, max_lr=1e-3)
    trainer = make_trainer(
        one_device, callbacks=[test], max_steps=steps, max_epochs=-1, limit_val_batches=0
    )
    trainer.fit(YOLOv3Module(one_device), datamodule=data)
    test.bar.close()
    losses = smooth_until_divergence(np.array([np.mean(loss) for loss in test.losses]))
    rates = test.rates[: len(losses)].tolist()
    return LRFinderResult(rates, losses.tolist(), rates[suggest_lr(losses)])


def smooth_until_divergence(losses: np.ndarray) -> np.ndarray:
    """Return the running mean over 15 steps of losses [n], up to divergence.

    That is where it is NaN, or 1.5 times its minimum so far.
    """
    means = np.array(
        [losses[max(0, i - RADIUS) : i + RADIUS + 1].mean() for i in range(len(losses))]
    )
    diverged = np.flatnonzero(~(means < DIVERGENCE * np.fmin.accumulate(means)))
    return means[: diverged[0] if len(diverged) else len(means)]


def suggest_lr(losses: np.ndarray) -> int:
    """Return the index at which losses [n] have made 90 % of their largest fall.

    The loss can rise at first, because the objectness target rises with the IoU of the boxes.
    Raises RuntimeError if it never falls.
    """
    fall = np.maximum.accumulate(losses) - losses
    if not fall.max(initial=0) > 0:
        raise RuntimeError(
            "The loss fell at no learning rate. Check the data, or set Config.max_lr, e.g. to 1e-3."
        )
    return int((fall >= fall.max() * FALL_FRACTION).argmax())


class RangeTest(pl.Callback):
    """Train each step at the next of `rates`; collect the losses of its batches."""

    def __init__(self, rates: np.ndarray):
        self.rates = rates
        self.losses = [[] for _ in rates]
        self.bar = tqdm(total=len(rates), desc="learning rates", file=sys.stdout, mininterval=2)

    def on_train_batch_start(self, trainer, *_) -> None:
        self.step = trainer.global_step
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[self.step]

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning has divided it
        self.losses[self.step].append(loss)
        self.bar.update(trainer.global_step - self.step)
