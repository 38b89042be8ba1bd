"""The Lightning Trainer for this machine: precision, devices, strategy."""

import logging
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from src.config import Config

for _name in ("pytorch_lightning", "lightning_fabric"):  # hides its tips, device lists and ranks
    logging.getLogger(_name).setLevel(logging.WARNING)


def resolve_precision(config: Config) -> str:
    """Return `config.precision`, or the fastest for "auto": float16 on CUDA, bfloat16 on CPUs that have it."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "16-mixed"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def resolve_strategy(config: Config) -> str | DDPStrategy:
    """Return "auto" for one device, else DDP. A script runs again for each further device; a notebook has `run_in_processes`.

    Buffers are not broadcast at each forward pass: in validation one process can have a batch more than another.
    """
    if config.devices == 1:
        return "auto"
    return DDPStrategy(
        broadcast_buffers=False, find_unused_parameters=getattr(config, "freeze_epochs", 0) > 0
    )


def make_trainer(config: Config, **options) -> pl.Trainer:
    """Build a Trainer for this machine and config. It writes and prints nothing unless `options` say so."""
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.devices,
        precision=resolve_precision(config),
        strategy=resolve_strategy(config),
        accumulate_grad_batches=config.accumulate_grad_batches,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options,
    )
