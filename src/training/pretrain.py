"""Pretraining: Darknet-53 learns to classify before it learns to detect.

python -m src.training.pretrain FOLDER --width 0.25        FOLDER: images in ImageNet's layout. The same command resumes.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from src.config import Settings
from src.data.datamodule import SampleIdSampler, make_loader
from src.data.imagefolder import (
    ClassificationDataset,
    collate_classification,
    list_classes,
    read_image_folder,
)
from src.model.network import YOLOv3
from src.model.pretrained import save_backbone
from src.serving.images import to_network_input
from src.training.fit import train
from src.training.optimizer import OneCycleModule
from src.training.trainer import make_trainer

CARD = """# Darknet-53, width {width:g}, pretrained to classify

The backbone of a YOLOv3: {parameters:.1f} million parameters in half precision, the exponential moving average (EMA) of the
weights. Trained on {images:,} images of {classes:,} classes ({data}) for {epochs} epochs at {image_size} pixels, of which the
last {final_epochs} at {final_size} pixels.

| validation ({val_images:,} images, {final_size} pixels) | |
| --- | --- |
| top-1 accuracy | {top1:.1%} |
| top-5 accuracy | {top5:.1%} |

`Config(pretrained_weights="{folder}", width={width:g})` starts a detector from it.
"""


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """Settings of a pretraining run, written as JSON into its folder. Fields of `Config` have the same meaning here."""

    data_root: str = ""  # folder in ImageNet's layout
    width: float = 0.25
    image_size: int = 64  # pixels per side
    final_size: int = 96  # pixels per side in the last epochs, and of the validation images
    final_epochs: int = 3
    min_crop: float = 0.35  # smallest random crop, as a fraction of the image's area
    cache_gb: float = 12.0
    num_workers: int = 1
    epochs: int = 30
    batch_size: int = 256
    accumulate_grad_batches: int = 1
    max_lr: float = 4e-3
    warmup_fraction: float = 0.1
    weight_decay: float = 0.05
    gradient_clip_val: float = 10.0
    ema_decay: float = 0.999
    label_smoothing: float = 0.1
    precision: str = "auto"
    devices: int = 1
    seed: int = 0
    run_dir: str = "runs/pretrain"

    def __post_init__(self):
        if not self.max_lr > 0:
            raise ValueError(
                f"max_lr is {self.max_lr}. Use a value above 0: the range test is for detectors."
            )

    def size_at(self, epoch: int) -> int:
        """Image size in an epoch, counted from 0."""
        return self.final_size if epoch >= self.epochs - self.final_epochs else self.image_size


class PretrainDataModule(pl.LightningDataModule):
    """Both splits of a folder in ImageNet's layout and their loaders."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        self.classes, train_samples, val_samples = read_image_folder(config.data_root)
        self.train_data = ClassificationDataset(train_samples, config, training=True)
        self.val_data = ClassificationDataset(val_samples, config, training=False)

    def train_dataloader(self) -> DataLoader:
        sampler = SampleIdSampler(self.train_data, self.config.seed)
        return self._loader(
            self.train_data, sampler=sampler, drop_last=len(sampler) >= self.config.batch_size
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val_data)

    def _loader(self, dataset: ClassificationDataset, **options) -> DataLoader:
        config = self.config
        return make_loader(
            dataset, config.batch_size, config.num_workers, collate_classification, **options
        )


class Darknet53Classifier(OneCycleModule):
    """Darknet-53 with average pooling and a linear layer (Redmon & Farhadi 2018, table 1): [B, 3, S, S] -> logits [B, C]."""

    monitor = "val/top1"
    progress_columns = {
        "loss": ("train/loss", 1, 3),
        "val loss": ("val/loss", 1, 3),
        "top-1 %": ("val/top1", 100, 1),
        "top-5 %": ("val/top5", 100, 1),
    }

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.backbone = YOLOv3(1, config.width).backbone
        num_classes = len(list_classes(Path(config.data_root) / "train"))
        self.linear = nn.Linear(self.backbone.stages[-1][0][0].out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.backbone(images)[0].mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(
            self(to_network_input(images)), labels, label_smoothing=self.config.label_smoothing
        )
        self.log(
            "train/loss",
            loss.detach(),
            on_step=False,
            on_epoch=True,
            batch_size=len(images),
            sync_dist=True,
        )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        logits = self(to_network_input(images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        values = {
            "val/loss": cross_entropy(logits, labels),
            "val/top1": hits[:, 0].float().mean(),
            "val/top5": hits.any(dim=1).float().mean(),
        }
        self.log_dict(values, on_epoch=True, batch_size=len(images), sync_dist=True)


def pretrain(
    config: PretrainConfig, data: PretrainDataModule | None = None, ckpt_path: str | None = "auto"
) -> Path:
    """Train the classifier, and return the folder of its backbone (weights, config.json, card), `run_dir`/backbone.

    ckpt_path: as for `fit`. Raises ValueError if `data_root` isn't in ImageNet's layout.
    """
    data = data or PretrainDataModule(config)
    module = train(Darknet53Classifier, config, data, ckpt_path)
    module.backbone.half().float()  # as written
    trainer = make_trainer(config.replace(devices=1, precision="32-true"))
    values = trainer.validate(module, data.val_dataloader(), verbose=False)[0]
    folder = Path(config.run_dir) / "backbone"
    facts = dataclasses.asdict(config) | {
        "data": Path(config.data_root).name,
        "images": len(data.train_data),
        "val_images": len(data.val_data),
        "classes": len(data.classes),
        "top1": values["val/top1"],
        "top5": values["val/top5"],
    }
    names = ("data", "images", "classes", "epochs", "image_size", "final_size", "top1", "top5")
    save_backbone(module.backbone, folder, config.width, {name: facts[name] for name in names})
    parameters = sum(p.numel() for p in module.backbone.parameters()) / 1e6
    (folder / "README.md").write_text(
        CARD.format(**facts, parameters=parameters, folder=folder), encoding="utf-8"
    )
    return folder


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(
        prog="python -m src.training.pretrain", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "data_root", help="folder in ImageNet's layout: train/CLASS/**/*.jpg and val the same"
    )
    for field in dataclasses.fields(PretrainConfig)[1:]:
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(
            name, type=field.type, default=field.default, help=f"default {field.default}"
        )
    try:
        print("Backbone:", pretrain(PretrainConfig(**vars(parser.parse_args()))))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
