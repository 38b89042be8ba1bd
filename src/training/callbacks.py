"""Callbacks and logger of the Trainer: metrics.csv, weight averaging, the stop at a non-finite loss, progress."""

import csv
import math
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from src.config import atomic_write
from src.training.module import sample_image_size

TIMED_STEPS = 10  # from which the time of an epoch is estimated
DURATIONS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))  # seconds and unit
FINITE_CHECK_INTERVAL = 10  # steps between two checks of the loss: each makes the GPU wait


class ResumableCSVLogger(Logger):
    """metrics.csv, one row per logging call. A resumed run keeps the rows before step `before`, its checkpoint's."""

    name, version = "", ""

    def __init__(self, path: Path, before: int = 0):
        super().__init__()
        self.path, self.rows, self.num_saved = path, [], 0
        if before and path.exists():
            with open(path, encoding="utf-8", newline="") as lines:
                self.rows = [row for row in csv.DictReader(lines) if int(row["step"]) < before]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float | Tensor], step: int) -> None:
        values = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in metrics.items()
        }
        self.rows.append(values | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        if self.num_saved < len(self.rows):
            atomic_write(self.path, self._write, "w", encoding="utf-8", newline="")
            self.num_saved = len(self.rows)

    def _write(self, file) -> None:
        writer = csv.DictWriter(file, sorted(set().union(*self.rows)))
        writer.writeheader()
        writer.writerows(self.rows)

    def log_hyperparams(self, *_) -> None:
        """Do nothing: config.json has them."""


class EMA(WeightAveraging):
    """Exponential moving average of weights and buffers. Its decay rises to `decay`: short runs forget their first weights.

    Lightning's own update reads a counter from the GPU, for which every step would wait.
    """

    state_key = "WeightAveraging"  # in older checkpoints

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def on_train_batch_end(self, trainer, module, *_) -> None:
        count = self._latest_update_step
        if trainer.global_step == count:  # gradients are accumulated
            return
        update = get_ema_multi_avg_fn(min(self.decay, (1 + count) / (10 + count)) if count else 0.0)
        pairs = [
            *zip(self._tensors(self._average_model.module), self._tensors(module), strict=True)
        ]
        for is_float in (True, False):
            group = [pair for pair in pairs if pair[0].is_floating_point() == is_float]
            if group:
                update(*zip(*group, strict=True), None)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    @staticmethod
    def _tensors(module: pl.LightningModule) -> Iterator[Tensor]:
        return chain(module.parameters(), module.buffers())


class StopIfNotFinite(pl.Callback):
    """Stop training when the loss of any process is NaN or infinite, before a checkpoint is written."""

    def __init__(self):
        self.finite = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        finite = outputs["loss"].isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if batch_idx % FINITE_CHECK_INTERVAL == 0 or trainer.is_last_batch:
            if not trainer.strategy.reduce(
                self.finite.float(), reduce_op="min"
            ):  # over all processes
                raise FloatingPointError(
                    f"The loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}). The last valid "
                    f"checkpoint is in {module.config.run_dir}. Use a lower Config.max_lr, or precision='32-true'."
                )
            self.finite = None


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit of which it has at least 1.5."""
    return next(
        (f"{seconds / length:.1f} {unit}" for length, unit in DURATIONS if seconds >= 1.5 * length),
        f"{seconds:.0f} s",
    )


def remaining_size_factor(config, step: int, epoch: int, timed: int = TIMED_STEPS) -> float:
    """Return the mean number of pixels per image in multi-resolution training, relative to the `timed` steps before `step`."""
    if not getattr(config, "multiscale_sizes", ()) or epoch >= config.close_mosaic_epoch:
        return 1.0
    steps = range(max(0, step - timed), step) or [0]  # fewer if gradients are accumulated
    sizes = [sample_image_size(config, earlier, epoch) for earlier in steps]
    return float(np.square(config.multiscale_sizes).mean() / np.square(sizes).mean())


class Progress(pl.callbacks.ProgressBar):
    """One bar for the whole training, an estimate of its time after ten steps, and one line of metrics per epoch.

    The metrics are the module's `progress_columns`.
    """

    def __init__(self):
        super().__init__()
        self.bar, self.enabled = None, True
        self.timed_from, self.estimated = 0.0, False

    def disable(self) -> None:
        """Lightning calls this in every process except the first."""
        self.enabled = False

    def on_train_start(self, trainer, module) -> None:
        steps = trainer.estimated_stepping_batches
        self.bar = tqdm(
            total=steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            file=sys.stdout,
            mininterval=2,
            dynamic_ncols=False,
            ncols=90,
            disable=not self.enabled,
        )
        self.start = time.monotonic()
        self.write_row("epoch", *module.progress_columns, "minutes", titles=module.progress_columns)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Time TIMED_STEPS steps, fewer in short epochs, but not the first, which is slower.

        Before the first of them, and after ten, a GPU has just been waited for (StopIfNotFinite).
        """
        steps = min(TIMED_STEPS, trainer.num_training_batches - 2)
        if batch_idx == 1 and not self.estimated:
            self.timed_from = time.monotonic()
        elif batch_idx == 1 + steps and not self.estimated:
            self.estimated = True
            step_seconds = (time.monotonic() - self.timed_from) / steps
            step_seconds *= remaining_size_factor(
                module.config, trainer.global_step, trainer.current_epoch, steps
            )
            self.write_estimate(
                step_seconds * trainer.num_training_batches,
                trainer.max_epochs - trainer.current_epoch,
            )

    def write_estimate(self, seconds: float, epochs: int) -> None:
        """Print the time of an epoch and of the remaining epochs, and a warning if that is more than a day."""
        total = seconds * epochs
        self.write(
            f"Estimated time: {format_duration(seconds)} per epoch, {format_duration(total)} for the remaining "
            f"{epochs}, plus validation."
        )
        if total > DURATIONS[0][0]:
            self.write(
                "Warning: that is more than a day. Use a GPU, or reduce Config.width, image_size or epochs. "
                'PRESETS["small"] suits a CPU.'
            )

    def on_train_batch_end(self, trainer, *_) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer, module) -> None:
        columns, metrics = module.progress_columns, trainer.callback_metrics
        values = (
            f"{factor * float(metrics.get(name, math.nan)):.{digits}f}"
            for name, factor, digits in columns.values()
        )
        minutes = (time.monotonic() - self.start) / 60
        self.write_row(trainer.current_epoch + 1, *values, f"{minutes:.1f}", titles=columns)

    def on_train_end(self, *_) -> None:
        self.bar.close()

    def on_exception(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def write_row(self, *cells, titles: Iterable[str]) -> None:
        """Print one cell per column, right-aligned to its title."""
        widths = (max(8, len(title) + 2) for title in ("epoch", *titles, "minutes"))
        self.write("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

    def write(self, text: str) -> None:
        """Print above the bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
