"""AdamW under OneCycle, with gradient clipping that works with a fused optimizer."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR


def onecycle_adamw(
    module: nn.Module, max_lr: float, weight_decay: float, warmup_fraction: float, total_steps: int
) -> dict:
    """Build a fused AdamW and its OneCycle schedule, as `configure_optimizers` returns them.

    Weight decay applies to kernels only, not to biases and batch norm: the first parameter group, and the second.
    """
    kernels = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() <= 1]
    groups = [
        {"params": kernels, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=max_lr, fused=True)
    if warmup_fraction * total_steps == 1:  # OneCycleLR divides by zero
        warmup_fraction = 1.001 / total_steps
    scheduler = OneCycleLR(optimizer, max_lr, total_steps, pct_start=warmup_fraction)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OneCycleModule(pl.LightningModule):
    """Base of the modules that `fit.train` trains: optimizer, schedule and gradient clipping by `config`.

    config: has max_lr, weight_decay, warmup_fraction and gradient_clip_val.
    Subclasses set `monitor` and `progress_columns`.
    """

    monitor = ""  # metric that selects best.ckpt; higher is better
    progress_columns: dict[
        str, tuple[str, float, int]
    ] = {}  # title -> metric, factor, digits; see `Progress`

    def __init__(self, config):
        super().__init__()
        self.config = config

    def configure_optimizers(self) -> dict:
        config, total_steps = self.config, self.trainer.estimated_stepping_batches
        return onecycle_adamw(
            self, config.max_lr or 1e-3, config.weight_decay, config.warmup_fraction, total_steps
        )

    def on_train_batch_start(self, *_) -> None:
        lr = torch.tensor(
            self.optimizers().param_groups[0]["lr"]
        )  # on the CPU: no step waits for it
        self.log("lr", lr, on_step=True, on_epoch=False)

    def configure_gradient_clipping(self, optimizer, *_, **__) -> None:
        """Clip by L2 norm. Lightning's own clipping refuses a fused optimizer, which could unscale float16 gradients itself."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip_grad_norm_(self.parameters(), self.config.gradient_clip_val or float("inf"))

    def on_train_start(self) -> None:
        """Raise ValueError if the data of a resumed run give another number of steps than its schedule has."""
        scheduled, steps = (
            self.lr_schedulers().total_steps,
            int(self.trainer.estimated_stepping_batches),
        )
        if scheduled != steps:
            raise ValueError(
                f"The data set has changed: this run's schedule has {scheduled:,} steps, the data now give {steps:,}. "
                "Restore the data set to resume, or start a new Config.run_dir."
            )
