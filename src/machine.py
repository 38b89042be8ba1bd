"""What this machine trains with: precision, devices, and the Trainer that knows them."""

import logging
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from src.config import Config

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its mere information, devices and tips, is left out


def precision_here(config: Config) -> str:
    """`config.precision`, or for "auto" the fastest this machine computes: float16 on CUDA, bfloat16 on newer CPUs."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "16-mixed"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def strategy_here(config: Config) -> str | DDPStrategy:
    """How devices share the work: not at all, or by DDP, its processes forked in a notebook, else this script again.

    Raises RuntimeError in a notebook whose GPU has been used before: a forked process can't use it again.
    Buffers are not sent at each forward pass: in evaluation one process may have a batch more than another.
    """
    if config.devices == 1:
        return "auto"
    method = "fork" if hasattr(sys, "ps1") else "popen"
    if method == "fork" and torch.cuda.is_initialized():
        raise RuntimeError(
            "several GPUs in a notebook need a process that has used none yet: restart it, set Config.max_lr instead of "
            "running the range test, and call fit first; or train in a script"
        )
    return DDPStrategy(start_method=method, broadcast_buffers=False, find_unused_parameters=config.freeze_epochs > 0)


def make_trainer(config: Config, **options) -> pl.Trainer:
    """A Trainer for this machine and these settings, silent but for what `options` add."""
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=config.devices,
        precision=precision_here(config), strategy=strategy_here(config),
        num_sanity_val_steps=0, enable_model_summary=False, use_distributed_sampler=False,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options,
    )  # fmt: skip
