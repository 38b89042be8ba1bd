"""Training samples per second: mosaics, augmentation, targets."""

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.baselines import BaselineDataset, course_augmentations
from benchmarks.synthetic_inputs import write_jpegs
from benchmarks.timing import Row, threads
from src.config import Config
from src.data.cache import ImageCache
from src.data.datamodule import collate
from src.data.mosaic import MosaicDataset
from src.model.network import ANCHORS

IMAGES, IMAGE_SIZE = 48, 416
WORKERS = 2


def rows() -> Iterator[Row]:
    """Yield times per sample of one core against the baseline, then two workers against one."""
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder = Path(name)
        records = write_jpegs(folder, IMAGES)
        config = Config(image_size=IMAGE_SIZE, epochs=1000)
        uncached = MosaicDataset(records, config)
        cached = MosaicDataset(records, config, ImageCache(folder / "cache.u8", IMAGES, IMAGE_SIZE))
        augment = course_augmentations(IMAGE_SIZE)
        course = BaselineDataset(records, IMAGE_SIZE, torch.tensor(ANCHORS), augment)
        cold = milliseconds_per_sample([cached], range(IMAGES))[0]
        later = range(IMAGES, 5 * IMAGES)
        warm, off, slow = milliseconds_per_sample([cached, uncached, course], later)
        baseline = f"course's loader, {slow:.1f} ms"
        for cache, value, target in (
            ("warm", warm, 5),
            ("cold (first epoch)", cold, 1.5),
            ("off", off, 0),
        ):
            name = f"Loader, one core, cache {cache}"
            yield Row(name, f"{value:.2f} ms per sample", baseline, slow / value, target)
        yield _workers(cached, config)


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
    """Return the rate of the real loader over `batches` batches, once its processes run."""
    warmup = 4 * workers
    sample_ids = range(10 * len(dataset), 10 * len(dataset) + (warmup + batches) * batch_size)
    options = {"sampler": sample_ids, "num_workers": workers, "collate_fn": collate}
    loader = DataLoader(dataset, batch_size, **options)
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
