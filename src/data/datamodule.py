"""Records to batches: mosaics, augmentation, the held-out letterbox, loaders."""

import os
import shutil
from functools import cached_property

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from src.config import VOC_CLASSES, Config
from src.data.cache import ImageCache, open_cache
from src.data.mosaic import MosaicDataset, to_sample
from src.data.records import ImageRecord
from src.data.shapes import draw_shapes
from src.data.voc import download_voc, read_voc
from src.serving.images import image_size_of, letterbox, letterbox_placement, load_image

SHARED = "/dev/shm"  # where loader processes leave their batches; 64 MB in a Docker container that asks for no more


class ValDataset(Dataset):
    """Evaluation samples: each record letterboxed, nothing random. Also gives the difficult flags."""

    def __init__(self, records: list[ImageRecord], config: Config, cache: ImageCache | None = None):
        self.records, self.config, self.cache = records, config, cache

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        record, side = self.records[index], self.config.image_size

        def read():
            return letterbox(load_image(record.image), side)[0], image_size_of(record.image)

        square, (width, height) = self.cache.fetch(index, read) if self.cache else read()
        placement = letterbox_placement(width, height, side)
        boxes = record.boxes * np.tile(placement[:2], 2) + np.tile(placement[2:], 2)
        boxes = np.clip(boxes, 0, side).astype(np.float32)
        return *to_sample(np.array(square), boxes, record.labels), torch.from_numpy(record.difficult)


def collate(samples: list[tuple]) -> dict[str, Tensor]:
    """Samples of one side -> a batch.

    "images" uint8 [B, 3, S, S], channels last in memory; "targets" float32 [N, 6]: image index, class, cx, cy,
    w, h in 0..1; and, of held-out samples, "difficult" bool [N].
    """
    images = torch.stack([sample[0].permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
    owner = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s[2]) for s in samples]))
    boxes, labels = (torch.cat([sample[part] for sample in samples]) for part in (1, 2))
    columns = owner[:, None].float(), labels[:, None].float(), boxes
    batch = {"images": images, "targets": torch.cat(columns, dim=1)}
    if len(samples[0]) == 4:
        batch["difficult"] = torch.cat([sample[3] for sample in samples])
    return batch


class SampleIdSampler(DistributedSampler):
    """Every picture once an epoch, shuffled by (seed, epoch), as draws of `MosaicDataset`; a part to each process."""

    def __init__(self, dataset: Dataset, seed: int):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        super().__init__(dataset, world, rank, shuffle=True, seed=seed)

    def __iter__(self):
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())


DATA_FIELDS = (  # what of a Config decides which batches there are
    "dataset", "voc_root", "train_splits", "val_splits", "classes", "skip_bad_files", "shapes_train", "shapes_val",
    "image_size", "multiscale_sizes", "mosaic_prob", "close_mosaic_epochs", "mosaic_scale", "image_scale", "min_visibility",
    "epochs", "batch_size", "devices", "seed",
)  # fmt: skip


class DetectionDataModule(pl.LightningDataModule):
    """The two splits of `config.dataset` and their loaders; the download happens in `prepare_data`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.train_records: list[ImageRecord] = []
        self.val_records: list[ImageRecord] = []

    def check_matches(self, config: Config) -> None:
        """Raises ValueError that names a setting of the data in which `config` differs from the one they were made with."""
        for name in DATA_FIELDS:
            ours, asked = getattr(self.config, name), getattr(config, name)
            if ours != asked:
                raise ValueError(
                    f"the data were made with Config.{name} {ours}, not {asked}: make them anew, DetectionDataModule(config)"
                )

    def prepare_data(self) -> None:
        if self.config.dataset == "voc" and self.config.classes == VOC_CLASSES:
            download_voc(self.config.voc_root, self.config.train_splits + self.config.val_splits)

    def setup(self, stage: str = "") -> None:
        """Read or draw the records, once. stage: Lightning's; both splits are read whatever it is."""
        if self.train_records:
            return
        config = self.config
        if config.dataset == "voc":
            where, how = config.voc_root, (config.classes, config.skip_bad_files)
            self.val_records = read_voc(where, config.val_splits, *how)
            self.train_records = read_voc(where, config.train_splits, *how)  # last: see above
        else:
            self.train_records = draw_shapes(config.shapes_train, seed=2 * config.seed)
            self.val_records = draw_shapes(config.shapes_val, seed=2 * config.seed + 1)
        train_cache = open_cache(self.train_records, "training", config.canvas_size, config.cache_gb)
        self.train_data = MosaicDataset(self.train_records, config, train_cache)
        val_cache = open_cache(self.val_records, "held-out", config.image_size, config.cache_gb)
        self.val_data = ValDataset(self.val_records, config, val_cache)

    def train_dataloader(self) -> DataLoader:
        """Batches without end of an epoch's remainder: the last, smaller one is dropped."""
        few = len(self.train_data) < self.config.batch_size
        return self._loader(self.train_data, SampleIdSampler(self.train_data, self.config.seed), drop_last=not few)

    def val_dataloader(self) -> DataLoader:
        """Every held-out picture exactly once, whatever the number of processes."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return self._loader(self.val_data, range(rank, len(self.val_data), world))

    def _loader(self, dataset: Dataset, sampler, **options) -> DataLoader:
        return DataLoader(
            dataset, self.config.batch_size, sampler=sampler, num_workers=self.workers, collate_fn=collate, **options,
            worker_init_fn=_single_thread_worker, persistent_workers=self.workers > 0, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    @cached_property
    def workers(self) -> int:
        """Loader processes: as many as asked for and as have room in SHARED, where a full disk kills by a bus error.

        Two finished batches wait there for each, and two more are on their way.
        """
        wanted = self.config.num_workers if self.config.num_workers >= 0 else min(8, os.cpu_count() or 1)
        batch = 3 * self.config.canvas_size**2 * self.config.batch_size * self.config.devices
        free = shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else 2 * batch * (wanted + 1)
        room = max(0, free // (2 * batch) - 1)
        if room < wanted:
            print(f"{SHARED} has {free / 1e6:.0f} MB free: room for the batches of {room} loader processes, not of "
                  f"{wanted}; going on with {room} (docker run --shm-size=2g gives more)")  # fmt: skip
        return min(wanted, room)


def _single_thread_worker(_: int) -> None:
    """One loader process, one thread: OpenCV's own threads would fight over the cores."""
    cv2.setNumThreads(0)
