"""One resolution against many on photographs: the same pictures, epochs and recipe.

python -m benchmarks.train_voc single|many [--epochs 80]    trains, then measures at each side; again: goes on where it stopped
VOC_ROOT names the folder that holds VOCdevkit.
"""

import argparse

from benchmarks.run_ablations import pooled
from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.fit import evaluate, fit, load_detector

SIDES = (160, 192, 224, 256, 288)  # drawn from


def settings(run: str, epochs: int) -> Config:
    """The settings of "single" or "multi" for so many epochs, a tenth of them without mosaics."""
    return Config(
        train_splits=("2012/train",), val_splits=("2012/val",), image_size=224, width=0.25, batch_size=16, max_lr=6e-3,
        epochs=epochs, close_mosaic_epochs=epochs // 10, multiscale_sizes=SIDES if run == "multi" else (), num_workers=1,
        run_dir=f"runs/photographs-{run}-{epochs}",
    )  # fmt: skip


def by_size(folder: str) -> str:
    """What the last epoch's weights reach at each side, as rows of Markdown."""
    detector = load_detector(folder, "last")
    lines = ["| side | class | no-object | object | mAP@.5 | AP of all |", "| --- " * 6 + "|"]
    for side in (128, *SIDES):
        found = evaluate(detector, DetectionDataModule(detector.config.replace(image_size=side, cache_gb=0)))
        cells = [100 * found.accuracies[name] for name in ("class", "no_object@0.05", "object@0.05")]
        percent = " | ".join(f"{value:.1f}" for value in cells)
        lines.append(f"| {side} | {percent} | {found.precisions['VOC AP@.5, area']:.3f} | {pooled(found):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("single", "multi"))
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    config = settings(arguments.run, arguments.epochs)
    fit(config, ckpt_path="auto")
    print(by_size(config.run_dir))


if __name__ == "__main__":
    main()
