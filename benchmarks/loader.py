"""Training samples per second: mosaics, augmentation, targets."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.baselines import BaselineDataset, course_augmentations, same_augmentations
from benchmarks.synthetic_inputs import write_jpegs
from benchmarks.timing import Row, threads
from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import collate, single_thread_worker
from src.data.mosaic import MosaicDataset
from src.data.records import ImageRecord
from src.model.network import ANCHORS

IMAGES, IMAGE_SIZE = 48, 416
WORKERS = 2
VOC_IMAGES = 16551  # in 2007 and 2012 trainval


def rows() -> Iterator[Row]:
    """Yield the time per sample of one core (cache warm, cold, off) against the baselines, then two workers against one."""
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder, anchors = Path(name), torch.tensor(ANCHORS)
        records = write_jpegs(folder, IMAGES)
        config = Config(image_size=IMAGE_SIZE, epochs=1000)
        uncached = MosaicDataset(records, config)
        cached = MosaicDataset(records, config, ImageCache(folder / "cache.u8", IMAGES, IMAGE_SIZE))
        course = BaselineDataset(records, IMAGE_SIZE, anchors, course_augmentations(IMAGE_SIZE))
        same = BaselineDataset(records, IMAGE_SIZE, anchors, same_augmentations(IMAGE_SIZE))
        cv2.setNumThreads(0)
        cold = milliseconds_per_sample([cached], range(IMAGES))[0]
        warm, off, slow, plain = milliseconds_per_sample(
            [cached, uncached, course, same], range(IMAGES, 5 * IMAGES)
        )
        baseline = f"course's loader, {slow:.1f} ms"
        yield Row(
            "Loader, one core, cache warm", f"{warm:.2f} ms per sample", baseline, slow / warm, 5
        )
        yield Row(
            "Loader, one core, cache cold (first epoch)",
            f"{cold:.2f} ms per sample",
            baseline,
            slow / cold,
            1.5,
        )
        yield Row("Loader, one core, cache off", f"{off:.2f} ms per sample", baseline, slow / off)
        baseline = f"course's loader with this project's augmentation, {plain:.1f} ms"
        yield Row(
            "Loader, one core, cache warm", f"{warm:.2f} ms per sample", baseline, plain / warm
        )
        yield _workers(cached, config)
        yield _memory(cached, records)


def milliseconds_per_sample(datasets: list[Dataset], sample_ids: range) -> list[float]:
    """Measure processor time per sample for each dataset; they take turns of IMAGES samples."""
    random.seed(0)
    times = [0.0] * len(datasets)
    for first in range(sample_ids.start, sample_ids.stop, IMAGES):
        for number, dataset in enumerate(datasets):
            start = time.process_time()
            for sample_id in range(first, first + IMAGES):
                dataset[sample_id if isinstance(dataset, MosaicDataset) else sample_id % IMAGES]
            times[number] += time.process_time() - start
    return [1e3 * value / len(sample_ids) for value in times]


def samples_per_second(
    dataset: MosaicDataset, batch_size: int, workers: int, batches: int = 24
) -> float:
    """Samples per second of the real loader over `batches` batches, without the start of the processes."""
    warmup = 4 * workers
    sample_ids = range(10 * len(dataset), 10 * len(dataset) + (warmup + batches) * batch_size)
    options = {"collate_fn": collate, "worker_init_fn": single_thread_worker}
    loader = DataLoader(dataset, batch_size, sampler=sample_ids, num_workers=workers, **options)
    times = [time.perf_counter() for _ in loader][-1 - batches :]
    return batches * batch_size / (times[-1] - times[0])


def _workers(dataset: MosaicDataset, config: Config, rounds: int = 3) -> Row:
    """The real loader with two processes against one: the best of several rounds, in turns."""
    turns = [
        [samples_per_second(dataset, config.batch_size, count) for count in (1, WORKERS)]
        for _ in range(rounds)
    ]
    one, two = map(max, zip(*turns, strict=True))
    return Row(
        f"Loader, {WORKERS} processes, cache warm",
        f"{two:.0f} samples/s",
        f"one process, {one:.0f} samples/s",
        two / one,
        1.8,
    )


def _memory(dataset: MosaicDataset, records: list[ImageRecord]) -> Row:
    """Memory of the shared cache with all images of 07+12, against decoded images in each of 8 workers."""
    sizes = [dataset.image(index)[0].size for index in range(len(records))]
    shared, decoded = VOC_IMAGES * (np.mean(sizes) + 16) / 1e9, VOC_IMAGES * 500 * 375 * 3 / 1e9
    limit = VOC_IMAGES * (IMAGE_SIZE * IMAGE_SIZE * 3 + 16) / 1e9
    ours = f"{shared:.1f} GB once, at most {limit:.1f} GB"
    baseline = f"decoded images in each of 8 processes, {8 * decoded:.0f} GB"
    return Row(
        "Cache of all 16,551 images of 07+12 at 416 (arithmetic)",
        ours,
        baseline,
        8 * decoded / shared,
    )
