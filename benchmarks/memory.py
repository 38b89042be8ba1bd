"""`python -m benchmarks memory`: GPU memory of a training step by width and image size.

The table is what `src.training.memory` estimates. With a GPU it also has the peak of real steps; without one, lines below
it compare the estimated activations with what autograd keeps.
"""

import gc

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.timing import markdown
from benchmarks.training import random_batch, train_steps
from src.config import Config
from src.model.network import YOLOv3
from src.training.memory import suggest_batch, training_gb

WIDTHS, SIZES = (0.25, 0.5, 1.0), (224, 320, 416, 448)
BATCH, CARD_GB, LARGEST_BATCH = 32, 16, 1024
ON_A_CPU = ((0.25, 416), (0.5, 224))  # widths and sizes
HEADER = (
    "width",
    "pixels",
    "activations per image, MB",
    "fixed, GB",
    f"batch of {BATCH}, GB",
    f"largest batch in {CARD_GB} GB",
    f"accumulate_grad_batches for {BATCH}",
)


def main(arguments: list[str]) -> None:
    """Print the table. Takes no options."""
    if arguments:
        raise SystemExit(
            f"python -m benchmarks memory takes no options, not {' '.join(arguments)}."
        )
    cuda, lines = torch.cuda.is_available(), []
    for width in WIDTHS:
        for size in SIZES:
            config = Config(
                width=width,
                image_size=size,
                batch_size=BATCH,
                precision="16-mixed",
                max_lr=1e-4,
                epochs=1,
            )
            lines.append(estimate(config) + ((measure(config),) if cuda else ()))
    print(markdown([HEADER + (("measured, GB",) if cuda else ()), *lines]))
    for width, size in () if cuda else ON_A_CPU:
        config, network = (
            Config(width=width, image_size=size, precision="32-true"),
            YOLOv3(20, width).train(),
        )
        kept, expected = (
            kept_bytes(network, torch.rand(1, 3, size, size)) / 1e6,
            activation_mb(config),
        )
        print(
            f"\nWidth {width:g}, {size} px, float32: autograd keeps {kept:.1f} MB per image, estimated {expected:.1f} MB."
        )


def activation_mb(config: Config) -> float:
    """The estimated activations per image in MB."""
    return 1e3 * (training_gb(config, 1) - training_gb(config, 0))


def estimate(config: Config) -> tuple[str, ...]:
    """The row of HEADER for a config. Fixed: weights, gradients, AdamW's moments, EMA and half-precision weights."""
    largest, _ = suggest_batch(config.replace(batch_size=2 * LARGEST_BATCH), CARD_GB)
    return (
        f"{config.width:g}",
        f"{config.image_size}",
        f"{activation_mb(config):.1f}",
        f"{training_gb(config, 0):.2f}",
        f"{training_gb(config, BATCH):.2f}",
        f"{largest}",
        f"{max(1, BATCH // largest)}",
    )


def measure(config: Config) -> str:
    """The peak of the GPU's memory in three real steps, in GB."""
    gc.collect()
    torch.cuda.empty_cache()
    batch = random_batch(config)
    torch.cuda.reset_peak_memory_stats()
    try:
        train_steps(config, batch, pl.Callback(), 3)
    except torch.OutOfMemoryError:
        return "out of memory"
    return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of network(images), without the weights."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = network(images)
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in weights
    )
