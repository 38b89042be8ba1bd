"""The parts of `benchmarks.gpu` that measure: smoke, throughput and loader."""

import gc
import json
import platform
import shutil
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch

from benchmarks.loader import IMAGES, samples_per_second
from benchmarks.synthetic_inputs import write_jpegs
from benchmarks.timing import now, threads
from benchmarks.training import NetworkClock, random_batch, train_steps
from src.config import SHAPE_CLASSES, Config
from src.data.cache import ImageCache
from src.data.datamodule import DetectionDataModule, available_cores
from src.data.mosaic import MosaicDataset
from src.data.shapes import draw_shapes
from src.serving.predictor import Predictor
from src.training.fit import fit

Result = dict[str, object]  # "measured" and "result" are a line of results.md; the rest are figures
WARMUP, NETWORK_STEPS = (
    10,
    10,
)  # steps before a measurement, and of which the network's share is measured
GOAL_RATE, GOAL_OUTSIDE = (
    1000,
    0.05,
)  # images per second, and the largest share of a step outside the network
GOAL_AT = "H100", 1.0, 416  # GPU, width and pixels of the goals
WORKERS = (1, 2, 4, 8)


def device_name() -> str:
    """The GPU's name, or the CPU's architecture."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    )


def environment() -> dict[str, object]:
    """Versions, and name and memory of the GPU."""
    figures = {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        memory = round(torch.cuda.mem_get_info()[1] / 1e9, 1)
        figures |= {
            "memory GB": memory,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        figures["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return figures


def speed_config(options: Namespace, **changes) -> Config:
    """Settings of a run whose speed is measured: low learning rate, one epoch, multi-resolution in all of it."""
    config = Config(
        width=options.width,
        image_size=options.size,
        batch_size=options.batch,
        max_lr=1e-4,
        epochs=1,
    )
    return config.replace(close_mosaic_epochs=0, **changes)


def smoke(options: Namespace, _: float) -> Iterator[Result]:
    """Two steps of a whole run on the synthetic data set, its validation, and a prediction with its weights."""
    figures = environment()
    yield {
        "measured": "environment",
        "result": ", ".join(f"{name} {value}" for name, value in figures.items()),
    } | figures
    start, folder = now(), options.out / "smoke"
    config = speed_config(
        options,
        dataset="shapes",
        classes=SHAPE_CLASSES,
        shapes_train=2 * options.batch,
        shapes_val=options.batch,
        cache_gb=0,
        num_workers=0,
        run_dir=str(folder),
    )
    detector = fit(config)
    candidates = Predictor(detector.model).candidates(draw_shapes(1)[0].image)
    delete_checkpoints(folder)
    if not (candidates.boxes.isfinite().all() and candidates.scores.isfinite().all()):
        raise ArithmeticError(
            "The Predictor's boxes or scores are not finite after two training steps."
        )
    seconds = now() - start
    yield {
        "measured": "2 training steps, validation, prediction",
        "result": f"{seconds:.1f} s",
        "metrics": detector.results,
    }


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run; at width 1 they are 3 GB."""
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()


class RateClock(pl.Callback):
    """Time the steps from number `warmup` (from 0) on, for at least `seconds`; then stop the training."""

    def __init__(self, warmup: int, seconds: float):
        self.warmup, self.minimum = warmup, seconds
        self.created, self.start, self.steps, self.seconds = now(), 0.0, 0, 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.warmup:
            self.start = now()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """StopIfNotFinite waits for the GPU every ten steps, so the clock without waiting is at most ten steps early."""
        self.steps = batch_idx + 1 - self.warmup
        if self.steps > 0 and time.perf_counter() - self.start >= self.minimum:
            self.seconds, trainer.should_stop = now() - self.start, True


def training_rate(config: Config, warmup: int, seconds: float) -> Result:
    """Images per second of real training steps on data in the GPU's memory, its peak memory, and the warm-up's seconds."""
    batch = random_batch(config)
    gc.collect()  # the modules of earlier measurements
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = RateClock(warmup, seconds)
    train_steps(config, batch, clock, 100_000)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    figures = {"images_per_s": clock.steps * config.batch_size / clock.seconds, "peak_gb": peak}
    return figures | {"warmup_s": clock.start - clock.created}


def describe(config: Config) -> str:
    """Name the settings of a measurement."""
    return f"training step, {config.precision}, width {config.width:g}, batch {config.batch_size}"


def throughput(options: Namespace, _: float) -> Iterator[Result]:
    """Rate and share outside the network for each precision; the best against the goals."""
    precisions = ("16-mixed", "bf16-mixed") if torch.cuda.is_available() else ("bf16-mixed",)
    rows = []
    for precision in precisions:
        config = speed_config(options, precision=precision)
        row, clock = training_rate(config, WARMUP, options.seconds), NetworkClock()
        train_steps(config, random_batch(config), clock, WARMUP + NETWORK_STEPS)
        step, network = clock.means(WARMUP)
        row |= {"measured": f"{describe(config)}, {options.size} px", "outside": 1 - network / step}
        memory = f", peak {row['peak_gb']:.1f} GB" if row["peak_gb"] else ""
        row["result"] = (
            f"{row['images_per_s']:,.1f} images/s, {row['outside']:.1%} outside the network{memory}"
        )
        rows.append(row)
        yield row
    yield goals(options, max(rows, key=lambda row: row["images_per_s"]))


def goals(options: Namespace, best: Result) -> Result:
    """Compare the fastest variant with the goals."""
    gpu, width, size = GOAL_AT
    rate, outside, met = best["images_per_s"], best["outside"], {True: "met", False: "not met"}
    result = f"goals are for an {gpu}, width {width:g}, {size} px"
    if gpu in device_name() and (options.width, options.size) == (width, size):
        result = f"at least {GOAL_RATE:,} images/s: {met[rate >= GOAL_RATE]} ({rate:,.0f}); "
        result += f"at most {GOAL_OUTSIDE:.0%} outside the network: {met[outside <= GOAL_OUTSIDE]} ({outside:.1%})"
    return {
        "measured": f"fastest: {best['measured']}",
        "result": result,
        "images_per_s": rate,
        "outside": outside,
    }


def loader(options: Namespace, _: float) -> Iterator[Result]:
    """Samples per second of the training loader with a filled cache, and the number of processes that training needs."""
    config = Config(
        image_size=options.size,
        epochs=1000,
        num_workers=available_cores(),
        batch_size=options.batch,
    )
    possible, rates = (
        DetectionDataModule(config).num_workers,
        {},
    )  # no more than shared memory has space for
    with tempfile.TemporaryDirectory() as name, threads(1):
        cache = ImageCache(Path(name) / "cache.u8", IMAGES, options.size)
        dataset = MosaicDataset(write_jpegs(Path(name), IMAGES), config, cache)
        for index in range(IMAGES):
            dataset.image(index)
        for workers in sorted({count for count in (*WORKERS, possible) if 0 < count <= possible}):
            rate = rates[workers] = samples_per_second(
                dataset, options.batch, workers, batches=max(24, 8 * workers)
            )
            yield {
                "measured": f"loader, {workers} processes, {options.size} px, cache warm",
                "result": f"{rate:,.0f} samples/s",
                "workers": workers,
                "samples_per_s": rate,
            }
    yield required_workers(options.out / "throughput.json", rates)


def required_workers(path: Path, rates: dict[int, float]) -> Result:
    """The smallest measured number of loader processes that is as fast as the fastest training in the results at `path`."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    needed = max((row.get("images_per_s", 0) for row in rows), default=0)
    if not (needed and rates):
        return {
            "measured": "loader processes that training needs",
            "result": "unknown: run throughput and loader first",
        }
    workers = next((workers for workers, rate in rates.items() if rate >= needed), None)
    result = f"{workers}" if workers else f"not reached by {max(rates)}"
    return {
        "measured": f"loader processes for {needed:,.0f} images/s",
        "result": result,
        "workers": workers,
    }
