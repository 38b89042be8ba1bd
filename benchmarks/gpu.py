"""Measure one GPU: whether everything runs, training images per second, and memory.

Each result is printed as a row of a Markdown table. It runs on a CPU too, e.g. with
--size 64 --width 0.0625 --batch 2 --steps 2.
"""

import argparse
import platform
import tempfile
from collections.abc import Iterator

import torch

from benchmarks.timing import markdown
from benchmarks.training import NetworkClock, StepClock, random_batch, train_steps
from src.config import SHAPE_CLASSES, Config
from src.data.shapes import draw_shapes
from src.serving.predictor import Predictor
from src.training.fit import fit

WARMUP = 3  # steps before a measurement
MEMORY_WIDTHS = (0.25, 0.5, 1.0)
MEMORY_SIZES = (224, 320, 416, 448)

Result = tuple[str, str]  # what was measured, result


def speed_config(options: argparse.Namespace, **changes) -> Config:
    """Settings of a short run whose speed is measured."""
    settings = {
        "width": options.width,
        "image_size": options.size,
        "batch_size": options.batch,
        "max_lr": 1e-4,
        "epochs": 1,
    }
    return Config(**(settings | changes))


def environment() -> Result:
    """Versions, and the name and memory of the GPU."""
    values = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[1] / 1e9
        values += [torch.cuda.get_device_name(), f"{memory:.0f} GB", f"CUDA {torch.version.cuda}"]
    return "environment", ", ".join(values)


def smoke(options: argparse.Namespace) -> Result:
    """Train two steps on the synthetic data set, validate, and predict with the weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = speed_config(
            options,
            dataset="shapes",
            classes=SHAPE_CLASSES,
            shapes_train=2 * options.batch,
            shapes_val=options.batch,
            cache_gb=0,
            num_workers=0,
            run_dir=folder,
        )
        detector = fit(config)
    candidates = Predictor(detector.model).candidates(draw_shapes(1)[0].image)
    if not (candidates.boxes.isfinite().all() and candidates.scores.isfinite().all()):
        raise ArithmeticError("Boxes or scores are not finite after two training steps.")
    return "2 training steps, validation, prediction", "finite"


def throughput(options: argparse.Namespace) -> Iterator[Result]:
    """Images per second of real training steps, and the share of a step outside the network."""
    for precision in ("16-mixed", "bf16-mixed") if torch.cuda.is_available() else ("bf16-mixed",):
        config = speed_config(options, precision=precision)
        batch = random_batch(config)
        rate = StepClock(WARMUP, options.steps)
        train_steps(config, batch, rate, WARMUP + options.steps)
        network_clock = NetworkClock()  # waits for the GPU in every step
        train_steps(config, batch, network_clock, WARMUP + options.steps)
        step, network = network_clock.means(WARMUP)
        images = f"{options.steps * options.batch / rate.seconds:,.1f} images/s"
        name = f"{precision}, width {options.width:g}, {options.size} px, batch {options.batch}"
        yield f"training step, {name}", f"{images}, {1 - network / step:.1%} outside the network"


def memory(options: argparse.Namespace) -> Iterator[Result]:
    """Peak memory of real training steps by width and image size."""
    for width in MEMORY_WIDTHS:
        for size in MEMORY_SIZES:
            config = speed_config(options, width=width, image_size=size, precision="16-mixed")
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                train_steps(config, random_batch(config), StepClock(0, WARMUP), WARMUP)
                peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
            except torch.OutOfMemoryError:
                peak = "out of memory"
            yield f"peak memory, width {width:g}, {size} px, batch {options.batch}", peak


def results(options: argparse.Namespace) -> Iterator[Result]:
    """Yield all results, the memory only with a GPU."""
    yield environment()
    yield smoke(options)
    yield from throughput(options)
    if torch.cuda.is_available():
        yield from memory(options)


def main(arguments: list[str]) -> None:
    """Print the results as a Markdown table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier (1)")
    parser.add_argument("--size", type=int, default=416, help="image size in pixels (416)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (32)")
    parser.add_argument("--steps", type=int, default=50, help="measured steps (50)")
    rows = []
    for result in results(parser.parse_args(arguments)):
        print(*result, sep=": ", flush=True)
        rows.append(result)
    print("\n" + markdown([("measured", "result"), *rows]))
