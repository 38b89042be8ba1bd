"""Training samples a second: mosaics, augmentation, targets."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.baselines import ObviousDataset, course_augmentations, same_augmentations
from benchmarks.synthetic_inputs import photographs
from benchmarks.timing import Row, threads
from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import _single_thread_worker, collate
from src.data.mosaic import MosaicDataset
from src.data.records import ImageRecord
from src.model.network import ANCHORS

PICTURES, SIDE = 48, 416
WORKERS = 2
VOC = 16551  # pictures of 07+12


def rows() -> Iterator[Row]:
    """Per core: warm, first epoch, without a cache, against obvious loaders; then two workers against one."""
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder, anchors = Path(name), torch.tensor(ANCHORS)
        records = photographs(folder, PICTURES)
        config = Config(image_size=SIDE, epochs=1000)
        bare = MosaicDataset(records, config)
        cached = MosaicDataset(records, config, ImageCache(folder / "cache.u8", PICTURES, SIDE))
        course = ObviousDataset(records, SIDE, anchors, course_augmentations(SIDE))
        same = ObviousDataset(records, SIDE, anchors, same_augmentations(SIDE))
        cv2.setNumThreads(0)
        first = _each([cached], range(PICTURES))[0]
        warm, cold, slow, plain = _each([cached, bare, course, same], range(PICTURES, 5 * PICTURES))
        against = f"course's loader, {slow:.1f} ms"
        yield Row("Loader, one core, cache warm", f"{warm:.2f} ms a sample", against, slow / warm, 5)
        yield Row("Loader, one core, cache cold (first epoch)", f"{first:.2f} ms a sample", against, slow / first, 1.5)
        yield Row("Loader, one core, cache switched off", f"{cold:.2f} ms a sample", against, slow / cold)
        same_work = f"obvious loader, our augmentation, {plain:.1f} ms"
        yield Row("Loader, one core, cache warm", f"{warm:.2f} ms a sample", same_work, plain / warm)
        yield _workers(cached, config)
        yield _memory(cached, records)


def _each(datasets: list[Dataset], draws: range) -> list[float]:
    """Milliseconds of one core's time a sample, for each dataset; they take turns of PICTURES samples."""
    random.seed(0)
    spent = [0.0] * len(datasets)
    for first in range(draws.start, draws.stop, PICTURES):
        for number, dataset in enumerate(datasets):
            start = time.process_time()
            for draw in range(first, first + PICTURES):
                dataset[draw if isinstance(dataset, MosaicDataset) else draw % PICTURES]
            spent[number] += time.process_time() - start
    return [1e3 * value / len(draws) for value in spent]


def _workers(dataset: MosaicDataset, config: Config, batches: int = 24, rounds: int = 3) -> Row:
    """Samples a second of the real loader with two processes against one; the best of some rounds each, in turns."""
    draws = range(10 * PICTURES, 10 * PICTURES + (batches + 8) * config.batch_size)
    options = {"collate_fn": collate, "worker_init_fn": _single_thread_worker}
    rates = [0.0, 0.0]
    for _ in range(rounds):
        for number, count in enumerate((1, WORKERS)):
            loader = DataLoader(dataset, config.batch_size, sampler=draws, num_workers=count, **options)
            times = [time.perf_counter() for _ in loader][-1 - batches :]  # the first wait for the processes to start
            rates[number] = max(rates[number], batches * config.batch_size / (times[-1] - times[0]))
    ours, against = f"{rates[1]:.0f} samples/s", f"one process, {rates[0]:.0f} samples/s"
    return Row(f"Loader, {WORKERS} processes, cache warm", ours, against, rates[1] / rates[0], 1.8)


def _memory(dataset: MosaicDataset, records: list[ImageRecord]) -> Row:
    """Shared memory of all pictures of 07+12 once, against every worker (8) holding its own decoded ones."""
    sizes = [dataset.image(index)[0].size for index in range(len(records))]
    shared, decoded = VOC * (np.mean(sizes) + 16) / 1e9, VOC * 500 * 375 * 3 / 1e9
    bound = VOC * (SIDE * SIDE * 3 + 16) / 1e9
    ours = f"{shared:.1f} GB once, at most {bound:.1f} GB"
    against = f"decoded pictures in each of 8 processes, {8 * decoded:.0f} GB"
    return Row("Cache of all 16,551 pictures of 07+12 at 416 (arithmetic)", ours, against, 8 * decoded / shared)
