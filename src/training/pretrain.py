"""Pretraining: Darknet-53 learns to classify before it learns to detect.

python -m src.training.pretrain FOLDER --width 0.25       the same command resumes

PRETRAIN has the settings without an option, such as the image sizes.

FOLDER is in ImageNet's layout, train/CLASS/*.jpg and val/CLASS/*.jpg. In a shell, this brings the
validation images of Tiny ImageNet (http://cs231n.stanford.edu/tiny-imagenet-200.zip) into it:

cd tiny-imagenet-200/val
while read -r f c _; do mkdir -p $c; mv images/$f $c/; done < val_annotations.txt; rmdir images
"""

import argparse
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import v2

from src.config import Config
from src.data.datamodule import SampleIdSampler, make_loader
from src.model.network import Darknet53
from src.model.pretrained import save_backbone
from src.serving.images import to_network_input
from src.training.devices import make_trainer
from src.training.fit import train
from src.training.module import sample_image_size
from src.training.optimizer import OneCycleModule

MIN_CROP = 0.35  # smallest random crop, as a fraction of the image's area
LABEL_SMOOTHING = 0.1
OPTIONS = {
    "width": "width multiplier of the network",
    "epochs": "epochs of training",
    "batch_size": "images per batch and device",
    "max_lr": "highest learning rate of OneCycle",
    "num_workers": "loader processes per device",
    "precision": "of Lightning, such as bf16-mixed",
    "devices": "number of GPUs",
    "run_dir": "folder for results",
}
CARD = """# Darknet-53, width {width:g}, pretrained to classify

The backbone of a YOLOv3 in half precision: the exponential moving average (EMA) of the weights.
Trained on {images:,} images of {classes:,} classes ({data}). Epochs: {epochs}, of these
{final_epochs} at {final_size} pixels (the last) and the others at {image_size}.

Validation at {final_size} pixels: top-1 accuracy {top1:.1%}.

`Config(pretrained_weights="FOLDER", width={width:g})` starts a detector from this folder.
"""


class PretrainConfig(Config):
    """Settings of a pretraining run. It doesn't use `Config`'s settings of detection."""

    def _validate(self) -> None:
        """Accept every image size: the classifier averages over the last grid. Refuse max_lr 0."""
        if not self.max_lr:
            raise ValueError("Pretraining has no range test. Set max_lr, for example to 4e-3.")


PRETRAIN = PretrainConfig(
    width=0.25,
    multiscale_sizes=(56,),  # pixels of the training images
    image_size=96,  # the same in the last epochs and in validation
    close_mosaic_epochs=4,  # number of these last epochs
    num_workers=1,
    epochs=30,
    batch_size=256,
    max_lr=4e-3,
    ema_decay=0.999,
    run_dir="runs/pretrain",
)


class RandomCrops(ImageFolder):
    """Training samples (uint8 [3, S, S], label): random crops (Szegedy et al. 2015).

    `dataset[sample_id]`, sample_id = epoch * len(dataset) + index. S depends on the epoch, see
    `PRETRAIN`. A sample depends on (seed, sample_id) only, so a resumed run has the same.
    """

    def __init__(self, folder: Path, config: PretrainConfig):
        super().__init__(folder)
        self.config = config

    def __getitem__(self, sample_id: int) -> tuple[Tensor, int]:
        epoch, index = divmod(sample_id, len(self))
        path, label = self.samples[index]
        size = sample_image_size(self.config, 0, epoch)
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, (MIN_CROP, 1), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
                v2.PILToTensor(),
            ]
        )
        torch.manual_seed(hash((self.config.seed, sample_id)))
        return transform(self.loader(path)), label


class PretrainDataModule(pl.LightningDataModule):
    """Both splits of a folder in ImageNet's layout and their loaders."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.config = config
        root = Path(config.data_root)
        size = config.image_size
        center = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
        self.train_data = RandomCrops(root / "train", config)
        self.val_data = ImageFolder(root / "val", center)
        if self.train_data.classes != self.val_data.classes:
            different = set(self.train_data.classes) ^ set(self.val_data.classes)
            raise ValueError(
                f"{root}: train and val have different classes, such as {sorted(different)[:3]}. "
                "Both need a folder of images per class."
            )

    def train_dataloader(self):
        sampler = SampleIdSampler(self.train_data, self.config.seed)
        return make_loader(
            self.train_data,
            self.config,
            sampler=sampler,
            drop_last=len(sampler) >= self.config.batch_size,
        )

    def val_dataloader(self):
        return make_loader(self.val_data, self.config)


class Darknet53Classifier(OneCycleModule):
    """Darknet-53 with average pooling and a linear layer: [B, 3, S, S] -> logits [B, C].

    Redmon & Farhadi 2018, table 1.
    """

    monitor = "val/top1"
    progress_metrics = {
        "loss": ("train/loss", ".3f"),
        "val loss": ("val/loss", ".3f"),
        "top-1": ("val/top1", ".1%"),
    }

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.backbone = Darknet53(config.width)
        num_classes = len(find_classes(Path(config.data_root) / "train")[0])
        self.linear = nn.Linear(self.backbone.channels[0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.backbone(images)[0].mean(dim=(2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self(to_network_input(images))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        self.log("train/loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        logits = self(to_network_input(images)).float()
        hits = logits.argmax(dim=1) == labels
        values = {
            "val/loss": nn.functional.cross_entropy(logits, labels),
            "val/top1": hits.float().mean(),
        }
        self.log_dict(values, on_epoch=True, batch_size=len(images), sync_dist=True)


def pretrain(config: PretrainConfig) -> Path:
    """Train the classifier, and return the folder of its backbone, `run_dir`/backbone.

    The folder has weights, config.json and a card. Resumes if `run_dir` has a checkpoint.
    Raises ValueError or FileNotFoundError if `data_root` isn't in ImageNet's layout.
    """
    data = PretrainDataModule(config)
    module = train(Darknet53Classifier, config, data, ckpt_path="auto")
    module.backbone.half().float()  # as written
    trainer = make_trainer(config.replace(devices=1, precision="32-true"))
    values = trainer.validate(module, data.val_dataloader(), verbose=False)[0]
    metadata = {
        "data": Path(config.data_root).name,
        "images": len(data.train_data),
        "classes": len(data.train_data.classes),
        "epochs": config.epochs,
        "image_size": config.multiscale_sizes[0],
        "final_epochs": config.epochs - config.close_mosaic_epoch,
        "final_size": config.image_size,
        "top1": values["val/top1"],
    }
    folder = Path(config.run_dir) / "backbone"
    save_backbone(module.backbone, folder, config.width, metadata)
    card = CARD.format(width=config.width, **metadata)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m src.training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_root", help="folder in ImageNet's layout")
    for name, text in OPTIONS.items():
        default = getattr(PRETRAIN, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{text} (%(default)s)",
        )
    try:
        print("Backbone:", pretrain(PRETRAIN.replace(**vars(parser.parse_args()))))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
