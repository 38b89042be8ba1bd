"""Callbacks of the Trainer: metrics.csv, averaged weights, a stop at a NaN loss, progress."""

import csv
import sys
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from src.config import atomic_write

LR_INTERVAL = 10  # steps between two rows of the learning rate


class MetricsCSV(pl.Callback):
    """Write metrics.csv: the learning rate every ten steps, and a row of all metrics per epoch.

    The file is replaced once per epoch, before the epoch's checkpoint. The checkpoint has the rows,
    too, so a resumed run continues them.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = state_dict["rows"]

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        if trainer.global_step % LR_INTERVAL == 0:
            place = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            self.rows.append(place | {"lr": optimizer.param_groups[0]["lr"]})

    def on_train_epoch_end(self, trainer, module) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        self.rows.append(place | metrics)
        if trainer.is_global_zero:
            atomic_write(self.path, self._write, "w", encoding="utf-8", newline="")

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

    @staticmethod
    def _floats(module: pl.LightningModule) -> list[Tensor]:
        return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


class StopIfNotFinite(pl.Callback):
    """Stop after an epoch with a validation loss of NaN or infinity, before its checkpoint."""

    def on_train_epoch_end(self, trainer, module) -> None:
        if not trainer.callback_metrics["val/loss"].isfinite():
            raise FloatingPointError(
                f"The validation loss is not finite in epoch {trainer.current_epoch + 1}: the "
                "weights are not usable. The checkpoints of the epoch before are in "
                f"{module.config.run_dir}. Use a lower Config.max_lr, or precision='32-true'."
            )


class Progress(pl.Callback):
    """One bar for the whole training with its remaining time, and one line of metrics per epoch.

    The metrics are the module's `progress_metrics`. Only the first process prints.
    """

    def on_train_start(self, trainer, module) -> None:
        self.bar = tqdm(
            total=trainer.estimated_stepping_batches,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            file=sys.stdout,
            mininterval=2,
            ncols=90,
            position=0,  # also after a run that was interrupted
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer, *_) -> None:
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_epoch_end(self, trainer, module) -> None:
        cells = [f"epoch {trainer.current_epoch + 1:>2}"]
        for name, (metric, style) in module.progress_metrics.items():
            cells.append(f"{name} {trainer.callback_metrics[metric]:{style}}")
        if trainer.is_global_zero:
            tqdm.write("  ".join(cells), file=sys.stdout)

    def on_train_end(self, *_) -> None:
        self.bar.close()
