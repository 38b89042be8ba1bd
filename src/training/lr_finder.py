"""TODO."""

import sys
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
from tqdm import tqdm

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.module import YOLOv3Module, make_trainer


@dataclass(frozen=True)
class LRFinderResult:
    """A learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186)."""

    rates: list[float]
    losses: list[float]  # smoothed, up to where the loss explodes
    suggestion: float


def find_lr(config: Config, data: DetectionDataModule, steps: int = 100) -> LRFinderResult:
    """Raise the rate from 1e-5 to 0.1 over `steps` batches on a net of its own, and suggest a peak for OneCycle.

    The suggestion is the rate at which the loss has made nine tenths of its fall: near the plateau before it explodes.
    (benchmarks/RECIPE.md has what lower and higher peaks reach. Lightning's finder takes the steepest point, lower still,
    and its running mean forgets 2 % a step, too slow for 100 steps.) Raises RuntimeError where the loss never falls.
    """
    data.check_matches(config)
    test = RangeTest(np.geomspace(1e-5, 0.1, steps))
    how = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    trainer = make_trainer(config.replace(devices=1), callbacks=[test], **how)
    trainer.fit(YOLOv3Module(config.replace(max_lr=1e-3)), datamodule=data)
    losses = smooth_until_divergence(np.array(test.losses))
    rates = test.rates[: len(losses)].tolist()
    return LRFinderResult(rates, losses.tolist(), rates[suggest_lr(losses)])


def smooth_until_divergence(losses: np.ndarray) -> np.ndarray:
    """Running mean over 15 steps of losses [n], up to where it is NaN or half as much again as its lowest so far."""
    means = np.array([losses[max(0, i - 7) : i + 8].mean() for i in range(len(losses))])
    exploded = np.flatnonzero(~(means < 1.5 * np.fmin.accumulate(means)))
    return means[: exploded[0] if len(exploded) else len(means)]


def suggest_lr(losses: np.ndarray) -> int:
    """Where losses [n] have made nine tenths of their deepest fall from the highest point so far.

    They may rise first: boxes that begin to overlap objects are asked for more objectness. See `find_lr`.
    """
    fallen = np.maximum.accumulate(losses) - losses
    if not fallen.max(initial=0) > 0:
        raise RuntimeError("the loss fell at no learning rate: look at the data, or set Config.max_lr yourself (1e-3 is usual)")
    return int((fallen >= fallen.max() * 0.9).argmax())


class RangeTest(pl.Callback):
    """Trains each step at the next of `rates` and keeps its loss in `losses`."""

    def __init__(self, rates: np.ndarray):
        self.rates, self.losses = rates, []
        self.bar = tqdm(total=len(rates), desc="learning rates", unit="step", file=sys.stdout, mininterval=2, ncols=90)

    def on_train_batch_start(self, trainer, *_) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[len(self.losses)]

    def on_train_batch_end(self, trainer, module, outputs, *_) -> None:
        self.losses.append(float(outputs["loss"]))
        self.bar.update()

    def on_train_end(self, *_) -> None:
        self.bar.close()
