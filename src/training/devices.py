"""The Lightning Trainer for this machine: precision, several GPUs, and a GPU out of memory."""

import functools
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from src.config import Config

for _name in ("pytorch_lightning", "lightning_fabric"):  # hides tips, device lists and ranks
    logging.getLogger(_name).setLevel(logging.WARNING)


def resolve_precision(config: Config) -> str:
    """Return `config.precision`, or the fastest for "auto".

    That is float16 on CUDA, bfloat16 on CPUs that have it, else float32.
    """
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "16-mixed"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def make_trainer(config: Config, **options) -> pl.Trainer:
    """Build a Trainer for this machine and config; it writes and prints nothing.

    With several devices it runs in one of as many processes, see `fit.train_in_process`. Buffers
    are not broadcast at each forward pass: in validation one process can have a batch more.
    """
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.devices,
        precision=resolve_precision(config),
        strategy=DDPStrategy(broadcast_buffers=False) if config.devices > 1 else "auto",
        accumulate_grad_batches=config.accumulate_grad_batches,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **{"enable_checkpointing": False} | options,
    )


def check_trainer(config: Config) -> None:
    """Raise ValueError or another error if this machine can't train with these settings."""
    found = torch.cuda.device_count()
    if 0 < found < config.devices:
        raise ValueError(f"Config.devices is {config.devices}, but GPUs found: {found}.")
    make_trainer(config.replace(devices=1))  # Lightning knows the precision


def free_trainer(data: pl.LightningDataModule | None) -> None:
    """Free what the last Trainer of `data` keeps, and PyTorch's unused GPU memory.

    That is its network, its optimizer and its loader processes.
    """
    if data is not None:
        data.trainer = None
    gc.collect()
    torch.cuda.empty_cache()


def explain_out_of_memory(function: Callable) -> Callable:
    """Decorate function(config, data, ...): if the GPU is out of memory, free it and say so."""

    @functools.wraps(function)
    def wrapper(config, data=None, *args, **kwargs):
        try:
            return function(config, data, *args, **kwargs)
        except (torch.OutOfMemoryError, torch.multiprocessing.ProcessRaisedException) as error:
            # its traceback keeps tensors on the GPU, so the new error is raised after it
            if "OutOfMemoryError" not in f"{type(error)} {error}":
                raise
        free_trainer(data)
        raise torch.OutOfMemoryError(
            f"The GPU is out of memory with Config.batch_size {config.batch_size}. Halve it and "
            "double accumulate_grad_batches for the same effective batch, or reduce image_size, "
            "multiscale_sizes or width. Stop other processes that use the GPU."
        )

    return wrapper
