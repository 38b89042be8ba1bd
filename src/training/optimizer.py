"""AdamW under OneCycle, with gradient clipping that works with a fused optimizer."""

import pytorch_lightning as pl
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR


class OneCycleModule(pl.LightningModule):
    """Base of the modules that `fit.train` trains: optimizer, schedule and gradient clipping.

    config: has max_lr, weight_decay, warmup_fraction and gradient_clip_val.
    Subclasses set `monitor`, the metric that selects best.ckpt (higher is better), and
    `progress_metrics`, the printed ones: name -> (metric, format).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    def configure_optimizers(self) -> dict:
        """Create AdamW, and OneCycle, which changes its learning rate every step.

        Its beta1 changes in the opposite direction, from 0.95 to 0.85 and back (Smith 2018,
        https://arxiv.org/abs/1803.09820). Weight decay applies to kernels only, not to biases and
        batch norm.
        """
        kernels = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [
            {"params": kernels, "weight_decay": self.config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.config.max_lr, fused=True)

        steps = int(self.trainer.estimated_stepping_batches)
        # With exactly one step of warm-up OneCycleLR would divide by zero
        warmup = self.config.warmup_fraction + 1e-6
        schedule = OneCycleLR(optimizer, self.config.max_lr, steps, pct_start=warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, *_, **__) -> None:
        """Clip by L2 norm. Lightning's own clipping refuses a fused optimizer.

        Its reason: such an optimizer could unscale float16 gradients itself.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip_grad_norm_(self.parameters(), self.config.gradient_clip_val or float("inf"))

    def on_train_start(self) -> None:
        """Raise ValueError if the data of a resumed run no longer fit its schedule."""
        scheduled = self.lr_schedulers().total_steps
        steps = int(self.trainer.estimated_stepping_batches)
        if scheduled != steps:
            raise ValueError(
                f"The data set has changed: this run's schedule has {scheduled:,} steps, the data "
                f"now give {steps:,}. Restore it to resume, or start a new Config.run_dir."
            )
