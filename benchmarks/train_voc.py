"""Train on VOC at one resolution or at several, and measure at each image size.

python -m benchmarks.train_voc single|multi [--epochs 80] [--size 224] [--backbone FOLDER] [--splits both|2012] [--max-lr 6e-3]
A second call with the same options resumes. The environment variable VOC_ROOT names the folder that holds VOCdevkit.
"""

import argparse

from benchmarks.run_ablations import SPLITS, base_config, micro_average_precision
from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.fit import evaluate, fit, load_detector

VAL_SPLITS = {
    "2007/val and 2012/val": ("2007/val", "2012/val"),
    "2007/val": ("2007/val",),
    "2012/val": ("2012/val",),
}


def sizes(size: int) -> tuple[int, ...]:
    """Return the sizes of multi-resolution training: multiples of 32 from 0.7 to 1.3 of `size`, as 160 to 288 for 224."""
    return tuple(side for side in range(32, 2 * size, 32) if 0.7 * size <= side <= 1.3 * size)


def settings(
    run: str,
    epochs: int,
    size: int,
    backbone: str,
    splits: str,
    max_lr: float,
    warmup_fraction: float,
) -> Config:
    """Settings of the run "single" or "multi"."""
    name = f"{run}-{splits}-{size}-{epochs}" + ("-backbone" if backbone else "")
    return base_config(epochs, size, splits, backbone).replace(
        multiscale_sizes=sizes(size) if run == "multi" else (),
        max_lr=max_lr,
        warmup_fraction=warmup_fraction,
        num_workers=1,
        run_dir=f"runs/train_voc/{name}",
    )


def by_size(folder: str) -> str:
    """Measure the weights of the last epoch on each validation split at `sizes` and one step beyond; return Markdown."""
    detector = load_detector(folder, "last")
    trained = sizes(detector.config.image_size)
    lines = [
        "| split | size | class | no-object | object | mAP@.5 | micro AP |",
        "| --- " * 7 + "|",
    ]
    for split, val_splits in VAL_SPLITS.items():
        for size in sorted({max(32, trained[0] - 32), *trained, trained[-1] + 32}):
            config = detector.config.replace(image_size=size, val_splits=val_splits, cache_gb=0)
            evaluation = evaluate(detector, DetectionDataModule(config))
            values = [
                100 * evaluation.accuracies[name]
                for name in ("class", "no_object@0.05", "object@0.05")
            ]
            percent = " | ".join(f"{value:.1f}" for value in values)
            map50, micro = (
                evaluation.precisions["VOC AP@.5, area"],
                micro_average_precision(evaluation),
            )
            lines.append(f"| {split} | {size} | {percent} | {map50:.3f} | {micro:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("single", "multi"))
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--backbone", default="", help="folder of pretrained weights to start from")
    parser.add_argument("--splits", choices=SPLITS, default="both", help="years of VOC to train on")
    parser.add_argument("--max-lr", type=float, default=6e-3, help="peak of OneCycle")
    parser.add_argument("--warmup-fraction", type=float, default=0.1)
    arguments = parser.parse_args()
    config = settings(**vars(arguments))
    fit(config, ckpt_path="auto")
    print(by_size(config.run_dir))


if __name__ == "__main__":
    main()
