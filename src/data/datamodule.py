"""Validation samples, batches and loaders."""

import os

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from src.config import DATA_ROOT, Config
from src.data.cache import open_cache
from src.data.datasets import open_dataset, read_splits
from src.data.mosaic import MosaicDataset, RecordDataset, to_sample
from src.data.records import ImageRecord
from src.data.shapes import draw_shapes
from src.data.voc import download_voc
from src.serving.images import letterbox, load_image


class ValDataset(RecordDataset):
    """Validation samples: each record letterboxed, not augmented, with its `difficult` flags."""

    def read(self, image: str | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an image letterboxed to `image_size` pixels, and its placement."""
        return letterbox(load_image(image), self.config.image_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, boxes = self.image(index)
        record = self.records[index]
        return *to_sample(image, boxes, record.labels), torch.from_numpy(record.difficult)


def collate(samples: list[tuple]) -> dict[str, Tensor | list[int]]:
    """Join samples of one image size into a batch.

    "images": uint8 [B, 3, S, S], channels last in memory. "targets": float32 [N, 6] = image index,
    class, cx, cy, w, h in 0..1, sorted by image. "counts": list of B ints, the objects per image,
    on the CPU so that a GPU doesn't wait. "difficult": bool [N], of validation samples only.
    """
    images = torch.stack([sample[0].permute(1, 2, 0) for sample in samples])  # [B, S, S, 3]
    boxes = torch.cat([sample[1] for sample in samples])  # [N, 4]
    labels = torch.cat([sample[2] for sample in samples])  # [N]
    counts = [len(sample[2]) for sample in samples]
    image_index = torch.repeat_interleave(torch.tensor(counts))  # [N]
    targets = torch.cat([image_index[:, None], labels[:, None], boxes], dim=1)  # [N, 6]
    batch = {"images": images.permute(0, 3, 1, 2), "targets": targets, "counts": counts}
    if len(samples[0]) == 4:
        batch["difficult"] = torch.cat([sample[3] for sample in samples])
    return batch


class SampleIdSampler(DistributedSampler):
    """Sample ids of `MosaicDataset`: each image once per epoch, split among the processes.

    The order depends only on (seed, epoch).
    """

    def __init__(self, dataset: Dataset, seed: int):
        super().__init__(dataset, *world_and_rank(), shuffle=True, seed=seed)

    def __iter__(self):
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())


def world_and_rank() -> tuple[int, int]:
    """Return the number of processes that train together, and this process's number."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def make_loader(dataset: Dataset, config: Config, **options) -> DataLoader:
    """Build a loader whose processes stay alive between epochs. options: of `DataLoader`."""
    num_workers = config.num_workers
    if num_workers < 0:
        has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        num_workers = min(8, max(1, cores // config.devices))
    return DataLoader(
        dataset,
        config.batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


class DetectionDataModule(pl.LightningDataModule):
    """Training and validation split of a data set, and their loaders.

    config: `config` with the format, splits and classes of the data set, see `open_dataset`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.given = config
        self.reader, self.config = open_dataset(config)
        self.train_records: list[ImageRecord] = []
        self.val_records: list[ImageRecord] = []

    def check_matches(self, config: Config) -> Config:
        """Return `config` with the format, splits and classes of the data set.

        Raises ValueError if a data setting differs from the config that this module was made with.
        """
        names = config.names(data=True)
        for name in names:
            own = (getattr(self.given, name), getattr(self.config, name))
            if getattr(config, name) not in own:
                raise ValueError(
                    f"The data module was created with Config.{name} = {own[0]!r}, but the config "
                    f"has {getattr(config, name)!r}. Create a new one with "
                    "DetectionDataModule(config)."
                )
        return config.replace(**{name: getattr(self.config, name) for name in names})

    def prepare_data(self) -> None:
        """Download VOC's published splits if they are missing in the default folder."""
        if self.config.dataset == "voc" and self.config.data_root == DATA_ROOT:
            download_voc(self.config.train_splits + self.config.val_splits)

    def setup(self, stage: str = "") -> None:
        """Read both splits on the first call. stage: passed by Lightning, not used."""
        if self.train_records:
            return
        config = self.config
        if config.dataset == "shapes":
            self.train_records = draw_shapes(config.shapes_train, seed=2 * config.seed)
            self.val_records = draw_shapes(config.shapes_val, seed=2 * config.seed + 1)
        else:
            self.train_records, self.val_records = read_splits(self.reader, config)
            self.reader = None  # frees the content of COCO files
        caches = [
            open_cache([record.image for record in records], name, size, config.cache_gb)
            for records, name, size in (
                (self.train_records, "training", config.canvas_size),
                (self.val_records, "validation", config.image_size),
            )
        ]
        self.train_data = MosaicDataset(self.train_records, config, caches[0])
        self.val_data = ValDataset(self.val_records, config, caches[1])

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, without an incomplete last batch unless there is only one."""
        sampler = SampleIdSampler(self.train_data, self.config.seed)
        return make_loader(
            self.train_data,
            self.config,
            collate_fn=collate,
            sampler=sampler,
            drop_last=len(sampler) >= self.config.batch_size,
        )

    def val_dataloader(self) -> DataLoader:
        """Return the validation loader: each image exactly once, split among the processes."""
        world, rank = world_and_rank()
        return make_loader(
            self.val_data,
            self.config,
            collate_fn=collate,
            sampler=range(rank, len(self.val_data), world),
        )
