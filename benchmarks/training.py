"""The training step: targets and loss, the share of the network, memory layout, precision, optimizer."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from statistics import mean

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.baselines import dense_loss, dense_targets
from benchmarks.synthetic_inputs import background_logits, random_objects
from benchmarks.timing import Row, milliseconds, now, seconds, threads
from src.config import Config
from src.model.network import ANCHORS, YOLOv3
from src.serving.images import to_network_input
from src.training.callbacks import EMA, StopIfNotFinite
from src.training.loss import YOLOLoss, assign_targets
from src.training.module import YOLOv3Module
from src.training.trainer import make_trainer, resolve_precision

IMAGE_SIZE, GRIDS = 416, [13, 26, 52]
BATCH = 16
SMALL_BATCH = 4  # for the comparison of layouts and precisions


def rows() -> Iterator[Row]:
    """Yield all rows of this file."""
    yield from _targets_and_loss()
    yield _outside_the_network()
    yield from _variants()


def _targets_and_loss() -> Iterator[Row]:
    """Targets and loss of a batch of 16, against a loop that builds dense grids and a loss that masks them."""
    targets, anchors = random_objects(BATCH, 6), torch.tensor(ANCHORS)
    logits, loss = background_logits(BATCH), YOLOLoss(Config())

    def grids() -> list[Tensor]:
        images = [
            dense_targets(targets[targets[:, 0] == i, 1:].tolist(), GRIDS, anchors)
            for i in range(BATCH)
        ]
        return [torch.stack(scale) for scale in zip(*images, strict=True)]

    jobs = (
        lambda: assign_targets(targets, GRIDS, anchors, BATCH),
        grids,
        lambda: loss(logits, targets, anchors),
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

    The backward pass of the loss ends with the gradient of the finest logits, the first one that the network needs.
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
        """Return the mean seconds per step, and of the network in it, without the first `warmup` steps."""
        return mean(self.steps[warmup:]), mean(self.network[warmup:])


def random_batch(config: Config) -> dict[str, Tensor]:
    """A batch of noise with 1 to 11 objects per image, as `collate` returns it, on the GPU if there is one."""
    device, size = "cuda" if torch.cuda.is_available() else "cpu", config.canvas_size
    images = torch.randint(256, (config.batch_size, size, size, 3), dtype=torch.uint8).permute(
        0, 3, 1, 2
    )
    return {"images": images.to(device), "targets": random_objects(config.batch_size, 6).to(device)}


def train_steps(config: Config, batch: dict[str, Tensor], clock: pl.Callback, steps: int) -> None:
    """Train on one batch again and again, with the callbacks of a real run: Lightning, loss, clipping, fused AdamW, EMA."""
    trainer = make_trainer(
        config,
        max_epochs=1,
        log_every_n_steps=10,
        callbacks=[StopIfNotFinite(), EMA(config.ema_decay), clock],
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
    return Row(
        "Step at width 1, 416, outside the network",
        ours,
        baseline,
        100 * (1 - network / step),
        5,
        True,
        "%",
    )


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, bf16: bool
) -> Callable[[], None]:
    """Return a training step of the network and the loss."""
    loss, targets, anchors = (
        YOLOLoss(Config()),
        random_objects(len(images), 6),
        torch.tensor(ANCHORS),
    )

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = loss(model(images), targets, anchors)
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _variants() -> Iterator[Row]:
    """Channels last against contiguous, bfloat16 against float32, fused AdamW against plain."""
    model = YOLOv3().train()
    fused = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    pixels = torch.randint(256, (SMALL_BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8)
    images = to_network_input(pixels.permute(0, 3, 1, 2))
    jobs = (
        _step(model, fused, images, True),
        _step(model, fused, images.contiguous(), True),
        _step(model, fused, images, False),
    )
    channels_last, contiguous, float32 = seconds(*jobs, rounds=2)
    rates = [
        f"{SMALL_BATCH / value:.2f} images/s" for value in (channels_last, contiguous, float32)
    ]
    yield Row(
        "Step, channels last, bfloat16",
        rates[0],
        f"contiguous, {rates[1]}",
        contiguous / channels_last,
    )
    yield Row(
        "Step, channels last, bfloat16", rates[0], f"float32, {rates[2]}", float32 / channels_last
    )
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    plain = torch.optim.AdamW(model.parameters(), 1e-5, foreach=False)
    ours, baseline = seconds(fused.step, plain.step, rounds=3)
    yield Row(
        "Optimizer step, 61.6 M weights, fused",
        milliseconds(ours),
        f"plain AdamW, {milliseconds(baseline)}",
        baseline / ours,
    )
