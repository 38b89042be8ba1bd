"""Callbacks of the Trainer: metrics.csv, averaged weights, a stop at a NaN loss, progress."""

import csv
import math
import sys
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from src.config import atomic_write

LR_INTERVAL = 10  # steps between two rows of the learning rate
FINITE_CHECK_INTERVAL = 10  # steps between two checks of the loss: each makes the GPU wait
TIMED_STEPS = 10  # from which the time of an epoch is estimated
DURATIONS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"))  # seconds and unit


class MetricsCSV(pl.Callback):
    """Write metrics.csv: the learning rate every ten steps, and a row of all metrics per epoch.

    The file is replaced once per epoch, before the epoch's checkpoint.
    before: number of steps of the checkpoint to resume from; rows of later steps are dropped.
    """

    def __init__(self, path: Path, before: int = 0):
        self.path, self.rows = path, []
        if before and path.exists():
            with open(path, encoding="utf-8", newline="") as lines:
                self.rows = [row for row in csv.DictReader(lines) if int(row["step"]) < before]

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step % LR_INTERVAL == 0:
            self._add(trainer, trainer.global_step, {"lr": optimizer.param_groups[0]["lr"]})

    def on_train_epoch_end(self, trainer, module) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._add(trainer, trainer.global_step - 1, metrics)
            atomic_write(self.path, self._write, "w", encoding="utf-8", newline="")

    def _add(self, trainer, step: int, values: dict[str, float]) -> None:
        self.rows.append({"epoch": trainer.current_epoch, "step": step} | values)

    def _write(self, file) -> None:
        writer = csv.DictWriter(file, sorted(set().union(*self.rows)))
        writer.writeheader()
        writer.writerows(self.rows)


class EMA(WeightAveraging):
    """Exponential moving average of weights and batch norm statistics.

    Its decay rises to `decay`: short runs forget their first weights. Lightning's own update reads
    a counter from the GPU, for which every step would wait.
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def on_train_batch_end(self, trainer, module, *_) -> None:
        count = self._latest_update_step
        if trainer.global_step == count:  # gradients are accumulated
            return
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        update = get_ema_multi_avg_fn(decay)
        update(self._floats(self._average_model.module), self._floats(module), None)
        self._latest_update_step = trainer.global_step

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        """Let the average take its anchors from the checkpoint as the module does."""
        super().on_load_checkpoint(trainer, module, checkpoint)
        self._average_model.module.on_load_checkpoint(checkpoint)

    @staticmethod
    def _floats(module: pl.LightningModule) -> list[Tensor]:
        tensors = chain(module.parameters(), module.buffers())
        return [tensor for tensor in tensors if tensor.is_floating_point()]


class StopIfNotFinite(pl.Callback):
    """Stop when the loss of any process is NaN or infinite, before a checkpoint is written."""

    def __init__(self):
        self.finite = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        finite = outputs["loss"].isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if batch_idx % FINITE_CHECK_INTERVAL and not trainer.is_last_batch:
            return
        if not trainer.strategy.reduce(self.finite.float(), reduce_op="min"):  # of all processes
            raise FloatingPointError(
                f"The loss is not finite at step {trainer.global_step} "
                f"(epoch {trainer.current_epoch}). The last valid checkpoint is in "
                f"{module.config.run_dir}. Use a lower Config.max_lr, or precision='32-true'."
            )
        self.finite = None


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit of which it has at least 1.5."""
    for length, unit in DURATIONS:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


class Progress(pl.Callback):
    """One bar for the whole training, an estimate of its time, and one line of metrics per epoch.

    The metrics are the module's `progress_columns`. Only the first process prints.
    """

    def __init__(self):
        self.bar = tqdm(disable=True)
        self.timed_from, self.estimated = 0.0, False

    def on_train_start(self, trainer, module) -> None:
        self.bar = tqdm(
            total=trainer.estimated_stepping_batches,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            file=sys.stdout,
            mininterval=2,
            ncols=90,
            disable=not trainer.is_global_zero,
        )
        self.start = time.monotonic()
        titles = ("epoch", *module.progress_columns, "minutes")
        self.widths = [max(8, len(title) + 2) for title in titles]
        self.write_row(titles)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Time TIMED_STEPS steps, fewer in short epochs, but not the first, which is slower.

        Before the first of them, and after ten, a GPU has just been waited for (StopIfNotFinite).
        """
        steps = min(TIMED_STEPS, trainer.num_training_batches - 2)
        if batch_idx == 1 and not self.estimated:
            self.timed_from = time.monotonic()
        elif batch_idx == 1 + steps and not self.estimated:
            self.estimated = True
            seconds = (time.monotonic() - self.timed_from) / steps * trainer.num_training_batches
            self.write_estimate(seconds, trainer.max_epochs - trainer.current_epoch)

    def write_estimate(self, seconds: float, epochs: int) -> None:
        """Print the time of an epoch and of the remaining ones; warn if that is more than a day."""
        total = seconds * epochs
        self.write(
            f"Estimated time: {format_duration(seconds)} per epoch, {format_duration(total)} for "
            f"the remaining {epochs}, plus validation."
        )
        if total > DURATIONS[0][0]:
            self.write(
                "Warning: that is more than a day. Use a GPU, or reduce Config.width, image_size "
                'or epochs. PRESETS["small"] suits a CPU.'
            )

    def on_train_batch_end(self, trainer, *_) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer, module) -> None:
        cells = [trainer.current_epoch + 1]
        for name, factor, digits in module.progress_columns.values():
            value = float(trainer.callback_metrics.get(name, math.nan))
            cells.append(f"{factor * value:.{digits}f}")
        self.write_row([*cells, f"{(time.monotonic() - self.start) / 60:.1f}"])

    def on_train_end(self, *_) -> None:
        self.bar.close()

    def on_exception(self, *_) -> None:
        self.bar.close()

    def write_row(self, cells: Iterable) -> None:
        """Print one cell per column, right-aligned to its title."""
        row = (f"{cell:>{width}}" for cell, width in zip(cells, self.widths, strict=True))
        self.write("".join(row))

    def write(self, text: str) -> None:
        """Print above the bar."""
        if not self.bar.disable:
            tqdm.write(text, file=sys.stdout)
