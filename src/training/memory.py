"""GPU memory: what a training step needs, and what to change if it does not fit."""

import functools
import gc
from collections.abc import Callable

import pytorch_lightning as pl
import torch

from src.config import Config
from src.training.trainer import resolve_precision

PARAMETERS = 61.6e6  # at width 1
STATE_BYTES = 5 * 4  # per parameter, in float32: weight, gradient, EMA and two moments of AdamW
ACTIVATION_GB = 0.373  # kept for the backward pass per image of 416 pixels, at width 1 in float32; tests/test_gpu_path.py measures it
USABLE = 0.9  # fraction of the GPU's memory; the rest is for temporary tensors and cuDNN


def training_gb(config: Config, batch_size: int) -> float:
    """Estimate the memory of a training step in GB: parameters and optimizer state, and the activations of a batch."""
    half = resolve_precision(config) != "32-true"
    state = PARAMETERS * config.width**2 * (STATE_BYTES + 2 * half) / 1e9
    activations = ACTIVATION_GB * config.width * (config.canvas_size / 416) ** 2 / (1 + half)
    return state + batch_size * activations


def suggest_batch(config: Config, memory_gb: float) -> tuple[int, int]:
    """Return batch_size and accumulate_grad_batches that fit: the batch halved at least once, their product kept."""
    batch_size, accumulate = config.batch_size // 2, 2 * config.accumulate_grad_batches
    while batch_size > 1 and training_gb(config, batch_size) > USABLE * memory_gb:
        batch_size, accumulate = batch_size // 2, 2 * accumulate
    return batch_size, accumulate


def out_of_memory_message(config: Config, memory_gb: float) -> str:
    """Say which settings need the memory, and which would fit a GPU of `memory_gb`."""
    batch_size, accumulate = suggest_batch(config, memory_gb)
    if batch_size and training_gb(config, batch_size) <= USABLE * memory_gb:
        advice = f"Use Config(batch_size={batch_size}, accumulate_grad_batches={accumulate}) for the same effective batch, or reduce"
    else:
        advice = "A smaller batch is not enough. Reduce"
    sizes = "image_size, multiscale_sizes" if config.multiscale_sizes else "image_size"
    return (
        f"The GPU is out of memory: it has {memory_gb:.1f} GB. A training step needs about "
        f"{training_gb(config, config.batch_size):.1f} GB for batch_size {config.batch_size}, images of {config.canvas_size} "
        f"pixels and width {config.width:g}. {advice} {sizes} or width. Stop other processes that use the GPU."
    )


def free_trainer(data: pl.LightningDataModule | None) -> None:
    """Free what the last Trainer of `data` keeps: network, optimizer, loader processes, and PyTorch's unused GPU memory."""
    if data is not None:
        data.trainer = None
    gc.collect()
    torch.cuda.empty_cache()


def explain_out_of_memory(function: Callable) -> Callable:
    """Decorate function(config, data, ...): if the GPU is out of memory, free it and raise an error that says what fits."""

    @functools.wraps(function)
    def wrapper(config: Config, data=None, *args, **kwargs):
        try:
            return function(config, data, *args, **kwargs)
        except torch.OutOfMemoryError:
            pass  # its traceback keeps tensors on the GPU, so the new error is raised after it
        free_trainer(data)
        raise torch.OutOfMemoryError(
            out_of_memory_message(config, torch.cuda.mem_get_info()[1] / 1e9)
        )

    return wrapper
