"""What happens around the training steps: averaging, the stop at a broken loss, progress."""

import csv
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from src.training.checkpoints import atomic_write

FORMER_COLUMNS = {  # of metrics.csv as older runs wrote it
    **{
        f"{split}/{term}": f"{split}/{term}_loss"
        for split in ("train", "val")
        for term in ("box", "object", "no_object", "class")
    },
    "val/map50": "val/mAP50",
    "lr-AdamW/pg1": "lr",
}


def read_metrics(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of a metrics.csv; columns with a former name get today's."""
    for row in csv.DictReader(lines):
        yield {FORMER_COLUMNS.get(name, name): value for name, value in row.items()}


class ResumableCSVLogger(Logger):
    """metrics.csv: a row for each time something was logged; on resume the rows before the checkpoint's step stay."""

    name, version = "", ""

    def __init__(self, path: Path, before: int = 0):
        super().__init__()
        self.path, self.rows, self.saved = path, [], 0
        if before and path.exists():
            with open(path, encoding="utf-8", newline="") as lines:
                self.rows = [row for row in read_metrics(lines) if int(row["step"]) < before]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float | Tensor], step: int) -> None:
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.rows.append(values | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        if self.saved < len(self.rows):
            atomic_write(self.path, self._write, "w", encoding="utf-8", newline="")
            self.saved = len(self.rows)

    def _write(self, file) -> None:
        writer = csv.DictWriter(file, sorted(set().union(*self.rows)))
        writer.writeheader()
        writer.writerows(self.rows)

    def log_hyperparams(self, *_) -> None:
        """They stand in config.json."""


FINITE_CHECK_INTERVAL = 10  # steps between two looks at the loss: a look waits for the GPU


def ema(decay: float) -> WeightAveraging:
    """Lightning's averaging with a decay that starts low, so that short runs forget their first weights."""

    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averaged, current, count)

    return WeightAveraging(multi_avg_fn=average)


class StopIfNotFinite(pl.Callback):
    """Ends training with a message when the loss is no longer a number; no checkpoint is written after it."""

    def __init__(self):
        self.finite = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        finite = outputs["loss"].isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        if batch_idx % FINITE_CHECK_INTERVAL == 0 or trainer.is_last_batch:
            if not trainer.strategy.reduce(self.finite.float(), reduce_op="min"):  # of all processes
                raise FloatingPointError(
                    f"the loss is not finite at step {trainer.global_step} (epoch {trainer.current_epoch}); the last good "
                    f"checkpoint stands in {module.config.run_dir}. Try a lower Config.max_lr or precision='32-true'"
                )
            self.finite = None


class Progress(pl.callbacks.ProgressBar):
    """One bar for the whole training, and a line of results after each epoch."""

    TITLE = f"{'epoch':>7}{'loss':>9}{'held out':>10}{'class':>8}{'no-obj':>8}{'object':>8}{'mAP.5':>8}{'minutes':>9}"

    def __init__(self):
        super().__init__()
        self.bar, self.shown = None, True

    def disable(self) -> None:
        """Lightning asks all processes but the first to be quiet."""
        self.shown = False

    def on_train_start(self, trainer, module) -> None:
        steps = trainer.estimated_stepping_batches
        self.bar = tqdm(total=steps, initial=trainer.global_step, desc="training", unit="step", file=sys.stdout,
                        mininterval=2, dynamic_ncols=False, ncols=90, disable=not self.shown)  # fmt: skip
        self.started = time.monotonic()
        self.line(self.TITLE + "   (accuracies in %, objectness threshold 0.05)")

    def on_train_batch_end(self, trainer, *_) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer, module) -> None:
        values, logged = module.results, trainer.callback_metrics
        row = [logged["train/loss"], logged.get("val/loss", float("nan"))]
        row += [100 * values.get(f"accuracy/{name}", float("nan")) for name in ("class", "no_object@0.05", "object@0.05")]
        cells = f"{row[0]:>9.3f}{row[1]:>10.3f}" + "".join(f"{value:>8.1f}" for value in row[2:])
        minutes = (time.monotonic() - self.started) / 60
        self.line(f"{trainer.current_epoch + 1:>7}{cells}{values.get('mAP50', float('nan')):>8.3f}{minutes:>9.1f}")

    def on_train_end(self, *_) -> None:
        self.bar.close()

    def on_exception(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def print(self, *args, **_) -> None:
        self.line(" ".join(map(str, args)))

    def line(self, text: str) -> None:
        """Print above the bar."""
        if self.shown:
            tqdm.write(text, file=sys.stdout)
