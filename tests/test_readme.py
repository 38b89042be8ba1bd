"""What the README shows works: its Python, its make targets, its links to files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import src.training.fit as training
from src.config import PRESETS, VOC_CLASSES, Config
from src.data.datamodule import DetectionDataModule
from src.serving import predict
from tests.planted import blurred_noise
from tests.test_formats import write_yolo
from tests.test_voc import obj, write_tree

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TINY = {
    "width": 0.25,
    "image_size": 64,
    "epochs": 1,
    "batch_size": 2,
    "max_lr": 1e-3,
    "num_workers": 0,
    "cache_gb": 0,
    "precision": "32-true",
    "close_mosaic_epochs": 0,
}


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_train_small(snippet, tmp_path, monkeypatch):
    """Run each snippet with a small network, images and epochs; then the commands below it."""
    fit, seen = training.fit, []

    def small(config: Config, *arguments):
        seen.append(config)
        sizes = tuple(range(64, 129, 32)) if config.multiscale_sizes else ()
        return fit(config.replace(**TINY, multiscale_sizes=sizes), *arguments)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "fit", small)
    write_own_data(tmp_path / "my_data", voc="classes=" in snippet)
    one_of_each = "".join(map(obj, VOC_CLASSES))
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        write_tree(
            tmp_path / "data",
            year,
            {split: {f"{split}{n}": one_of_each for n in range(2)} for split in splits},
        )
    presets = {
        "voc": Config(data_root=str(tmp_path / "data")),
        "small": PRESETS["small"].replace(**TINY),
    }
    monkeypatch.setattr("src.config.PRESETS", presets)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(seen) == 1 and (Path(seen[0].run_dir) / "best.ckpt").exists()
    assert len(DetectionDataModule(seen[0]).config.classes) in (2, 20)
    if "save_pretrained" in snippet:
        run_prediction(monkeypatch)
        assert (tmp_path / "runs/mine/curves.png").exists() and (tmp_path / "space/app.py").exists()


def write_own_data(folder: Path, voc: bool) -> None:
    """Write a data set of the classes "mask" and "no mask", in the VOC or the YOLO format."""
    if voc:
        one_of_each = "".join(obj(name) for name in ("mask", "no mask"))
        write_tree(
            folder,
            "2012",
            {"train": {"1": one_of_each, "2": one_of_each}, "val": {"3": one_of_each}},
        )
    else:
        data = "train: images/train\nval: images/val\nnames: [mask, no mask]\n"
        lines = "0 0.3 0.5 0.4 0.5\n1 0.6 0.5 0.4 0.5\n"
        write_yolo(
            folder,
            {"images/train/1.jpg": lines, "images/train/2.jpg": lines, "images/val/3.jpg": lines},
            data,
        )


def run_prediction(monkeypatch) -> None:
    """Run the README's prediction commands on an image photo.jpg."""
    commands = re.findall(r"^python -m src\.serving\.predict ([^#\n]+)", README, re.MULTILINE)
    assert commands
    Image.fromarray(blurred_noise()).save("photo.jpg")
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["predict", *shlex.split(command)])
        with pytest.raises(SystemExit) as end:
            predict.main()
        assert end.value.code == 0
    assert (
        Path("runs/predict/predictions.json").exists()
        and Path("runs/predict/photo_heatmap.jpg").exists()
    )


def test_make_targets_and_linked_files_exist():
    for target in set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE)):
        name = "".join(target)
        assert (
            subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True).returncode == 0
        ), name
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
