"""The training step: targets and loss, what surrounds the network, layout, optimizer, precision."""

import contextlib
import io
import time
import warnings
from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.baselines import dense_loss, dense_targets
from benchmarks.synthetic_inputs import empty_logits, objects
from benchmarks.timing import Row, milliseconds, seconds, threads
from src.config import Config
from src.model.network import ANCHORS, YOLOv3
from src.serving.images import to_network_input
from src.training.callbacks import StopIfNotFinite, ema
from src.training.loss import YOLOLoss, assign_targets
from src.training.module import YOLOv3Module, make_trainer, resolve_precision

SIDE, GRIDS = 416, [13, 26, 52]
BATCH = 16
SMALL = 4  # images of the batches on which variants are compared


def rows() -> Iterator[Row]:
    """All rows of this file."""
    yield from _targets()
    yield _outside()
    yield from _variants()


def _targets() -> Iterator[Row]:
    """Targets and loss of a batch of 16, against a loop that builds dense grids and a loss that masks them."""
    targets, anchors = objects(BATCH, 6), torch.tensor(ANCHORS)
    logits, loss = empty_logits(BATCH), YOLOLoss(Config())

    def grids() -> list[Tensor]:
        pictures = [dense_targets(targets[targets[:, 0] == i, 1:].tolist(), GRIDS, anchors) for i in range(BATCH)]
        return [torch.stack(scale) for scale in zip(*pictures, strict=True)]

    jobs = (
        lambda: assign_targets(targets, GRIDS, anchors, BATCH), grids,
        lambda: loss(logits, targets, anchors), lambda: dense_loss(logits, grids(), anchors, targets),
    )  # fmt: skip
    with threads(1):
        ours, loop, both, loop_both = seconds(*jobs, rounds=8)
    many = f"{BATCH} images, {len(targets)} objects, one core"
    against = f"loop over boxes, dense grids, {milliseconds(loop)}"
    yield Row(f"Targets, {many}", milliseconds(ours), against, loop / ours, 50)
    against = f"the loop and masks on its grids, {milliseconds(loop_both)}"
    yield Row(f"Targets and loss, {many}", milliseconds(both), against, loop_both / both, 50)


class NetworkClock(pl.Callback):
    """Times whole training steps, and within them the network's forward and backward pass.

    The loss's part of the backward pass ends where it hands over the finest logits, the first that the network needs.
    """

    def __init__(self, network: nn.Module):
        self.steps, self.inside, self.start, self.mark = [], [], 0.0, 0.0
        network.register_forward_pre_hook(lambda *_: self._tick())
        network.register_forward_hook(lambda module, inputs, logits: self._forward_done(logits))

    def _tick(self) -> None:
        self.mark = time.perf_counter()

    def _forward_done(self, logits: list[Tensor]) -> None:
        self.inside.append(time.perf_counter() - self.mark)
        logits[-1].register_hook(lambda _: self._tick())

    def on_train_batch_start(self, *_) -> None:
        self.start = time.perf_counter()

    def on_after_backward(self, *_) -> None:
        self.inside[-1] += time.perf_counter() - self.mark

    def on_train_batch_end(self, *_) -> None:
        self.steps.append(time.perf_counter() - self.start)


def _outside(steps: int = 3) -> Row:
    """The part of a real step (Lightning, loss, clipping, fused AdamW, averaging) that is not the network."""
    config = Config(width=1.0, image_size=SIDE, epochs=1, max_lr=1e-4, batch_size=BATCH)
    detector = YOLOv3Module(config)
    clock = NetworkClock(detector.model)
    images = torch.randint(256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    batches = [{"images": images, "targets": objects(BATCH, 6)}] * (steps + 1)
    trainer = make_trainer(config, max_epochs=1, log_every_n_steps=10, callbacks=[StopIfNotFinite(), ema(0.998), clock])
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        trainer.fit(detector, torch.utils.data.DataLoader(batches, batch_size=None))
    whole, inside = sum(clock.steps[1:]) / steps, sum(clock.inside[1:]) / steps
    ours = f"{1e3 * (whole - inside):.0f} ms outside the network"
    against = f"whole step, {BATCH} images, {resolve_precision(config)}, {whole:.2f} s"
    return Row("Step at width 1, 416, outside the network", ours, against, 100 * (1 - inside / whole), 5, True, "%")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, bf16: bool):
    """A training step of the network and the loss, to be timed."""
    loss, targets, anchors = YOLOLoss(Config()), objects(len(images), 6), torch.tensor(ANCHORS)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = loss(model(images), targets, anchors)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _variants() -> Iterator[Row]:
    """One thing changed at a time."""
    model = YOLOv3().train()
    fused = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    images = to_network_input(torch.randint(256, (SMALL, SIDE, SIDE, 3), dtype=torch.uint8).permute(0, 3, 1, 2))
    half = _step(model, fused, images, True)
    jobs = half, _step(model, fused, images.contiguous(), True), _step(model, fused, images, False)
    last, first, single = seconds(*jobs, rounds=2)
    rates = [f"{SMALL / value:.2f} images/s" for value in (last, first, single)]
    yield Row("Step, channels last, bfloat16", rates[0], f"contiguous, {rates[1]}", first / last)
    yield Row("Step, channels last, bfloat16", rates[0], f"float32, {rates[2]}", single / last)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    plain = torch.optim.AdamW(model.parameters(), 1e-5, foreach=False)
    one, two = seconds(fused.step, plain.step, rounds=3)
    against = f"plain AdamW, {milliseconds(two)}"
    yield Row("Optimizer step, 61.6 M weights, fused", milliseconds(one), against, two / one)
