"""The training step: targets and loss, and its share outside the network."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from statistics import mean

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.baselines import dense_loss, dense_targets
from benchmarks.synthetic_inputs import random_logits, random_objects
from benchmarks.timing import Row, milliseconds, now, seconds, threads
from src.config import Config
from src.model.network import ANCHORS
from src.training.callbacks import EMA
from src.training.devices import make_trainer, resolve_precision
from src.training.loss import YOLOLoss, assign_targets
from src.training.module import YOLOv3Module

IMAGE_SIZE, GRIDS = 416, [13, 26, 52]
BATCH = 16


def rows() -> Iterator[Row]:
    """Yield all rows of this file."""
    yield from _targets_and_loss()
    yield _outside_the_network()


def _targets_and_loss() -> Iterator[Row]:
    """Measure targets and loss against a loop over boxes that fills grids, and masks on them."""
    targets, anchors = random_objects(BATCH, 6), torch.tensor(ANCHORS)
    counts = targets[:, 0].long().bincount(minlength=BATCH).tolist()
    logits, loss = random_logits(BATCH), YOLOLoss(Config())

    def grids() -> list[Tensor]:
        images = [
            dense_targets(targets[targets[:, 0] == i, 1:].tolist(), GRIDS, anchors)
            for i in range(BATCH)
        ]
        return [torch.stack(scale) for scale in zip(*images, strict=True)]

    jobs = (
        lambda: assign_targets(targets, GRIDS, anchors, BATCH),
        grids,
        lambda: loss(logits, targets, counts, anchors),
        lambda: dense_loss(logits, grids(), anchors, targets),
    )
    with threads(1):
        assign, loop, both, loop_both = seconds(*jobs, rounds=8)
    batch = f"{BATCH} images, {len(targets)} objects, one core"
    baseline = f"loop over boxes, dense grids, {milliseconds(loop)}"
    yield Row(f"Targets, {batch}", milliseconds(assign), baseline, loop / assign, 50)
    baseline = f"the loop, masks on dense grids, {milliseconds(loop_both)}"
    yield Row(f"Targets and loss, {batch}", milliseconds(both), baseline, loop_both / both, 50)


class NetworkClock(pl.Callback):
    """Time whole training steps, and the network's forward and backward pass within them.

    The backward pass of the loss ends with the gradient of the finest logits, the first one that
    the network needs.
    """

    def __init__(self):
        self.steps, self.network, self.start, self.mark = [], [], 0.0, 0.0

    def on_fit_start(self, trainer, module) -> None:
        forward = module.model.forward

        def timed(images: Tensor) -> list[Tensor]:
            start = now()
            logits = forward(images)
            self.network.append(now() - start)
            logits[-1].register_hook(lambda _: self._mark())
            return logits

        module.model.forward = timed

    def _mark(self) -> None:
        self.mark = now()

    def on_train_batch_start(self, *_) -> None:
        self.start = now()

    def on_after_backward(self, *_) -> None:
        self.network[-1] += now() - self.mark

    def on_train_batch_end(self, *_) -> None:
        self.steps.append(now() - self.start)

    def means(self, warmup: int) -> tuple[float, float]:
        """Return the mean seconds per step and of its network, without the first `warmup` steps."""
        return mean(self.steps[warmup:]), mean(self.network[warmup:])


class StepClock(pl.Callback):
    """Time `steps` training steps after `warmup` others, without waiting for the GPU in between."""

    def __init__(self, warmup: int, steps: int):
        self.first = warmup
        self.last = warmup + steps - 1
        self.start = self.seconds = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self.start = now()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == self.last:
            self.seconds = now() - self.start


def random_batch(config: Config) -> dict[str, Tensor]:
    """Return a batch of noise with 1 to 11 objects per image, on the GPU if there is one."""
    device, size = "cuda" if torch.cuda.is_available() else "cpu", config.canvas_size
    images = torch.randint(256, (config.batch_size, size, size, 3), dtype=torch.uint8).permute(
        0, 3, 1, 2
    )
    targets = random_objects(config.batch_size, 6)
    counts = targets[:, 0].long().bincount(minlength=config.batch_size).tolist()
    return {"images": images.to(device), "targets": targets.to(device), "counts": counts}


def train_steps(config: Config, batch: dict[str, Tensor], clock: pl.Callback, steps: int) -> None:
    """Train on one batch again and again, with the weights averaged as in a real run."""
    trainer = make_trainer(
        config,
        max_epochs=1,
        log_every_n_steps=10,
        callbacks=[EMA(config.ema_decay), clock],
    )
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.fit(YOLOv3Module(config), DataLoader([batch] * steps, batch_size=None))


def _outside_the_network(steps: int = 3) -> Row:
    """The share of a real step that is spent outside the network."""
    config = Config(width=1.0, image_size=IMAGE_SIZE, epochs=1, max_lr=1e-4, batch_size=BATCH)
    clock = NetworkClock()
    train_steps(config, random_batch(config), clock, steps + 1)
    step, network = clock.means(warmup=1)
    ours = f"{1e3 * (step - network):.0f} ms outside the network"
    baseline = f"whole step, {BATCH} images, {resolve_precision(config)}, {step:.2f} s"
    name = "Step at width 1, 416, outside the network"
    return Row(name, ours, baseline, 100 * (1 - network / step), 5, True, "%")
