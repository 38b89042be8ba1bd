"""The Lightning Trainer for this machine: precision, several GPUs, and a GPU out of memory."""

import functools
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException

from src.config import Config

GRACE_SECONDS = 5  # after an error, until the other processes are killed

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

    With several devices, DDP runs a script again for each; a notebook has `run_in_processes`.
    Buffers are not broadcast at each forward pass: in validation one process can have a batch more.
    """
    strategy = "auto"
    if config.devices > 1:
        unused = getattr(config, "freeze_epochs", 0) > 0  # a frozen backbone has no gradients
        strategy = DDPStrategy(broadcast_buffers=False, find_unused_parameters=unused)
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.devices,
        precision=resolve_precision(config),
        strategy=strategy,
        accumulate_grad_batches=config.accumulate_grad_batches,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **{"enable_checkpointing": False} | options,
    )


def run_in_processes(count: int, function: Callable, *args) -> None:
    """Call `function(*args)` in `count` new processes, in which Lightning finds its rank.

    For notebooks, which Lightning can't run again as it does a script. Processes are spawned,
    because a fork of a process that has used the GPU can't use it: the function and the classes of
    its arguments must be importable, not defined in the notebook. Only the first process prints.
    An error ends all processes and is raised with its traceback.
    """
    context = mp.spawn(_run, (find_free_network_port(), function, args), nprocs=count, join=False)
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except ProcessExitedException as error:
        raise RuntimeError(
            f"Training stopped: {error}. Often there is too little memory: reduce "
            "Config.num_workers. Or `data` is of a class that the notebook defines: move the class "
            "to a file and import it."
        ) from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _run(rank: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        sys.stderr = sys.stdout
    function(*args)


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
        except torch.OutOfMemoryError:
            pass  # its traceback keeps tensors on the GPU, so the new error is raised after it
        free_trainer(data)
        raise torch.OutOfMemoryError(
            f"The GPU is out of memory with Config.batch_size {config.batch_size}. Halve it and "
            "double accumulate_grad_batches for the same effective batch, or reduce image_size, "
            "multiscale_sizes or width. Stop other processes that use the GPU."
        )

    return wrapper
