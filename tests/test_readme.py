"""What the README shows works: its Python, its make targets, its links to files."""

import re
import subprocess
from pathlib import Path

import pytest

import src.training.fit as training
from src.config import Config
from src.data.datamodule import DetectionDataModule
from tests.test_voc import obj, write_tree

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_train_small(snippet, tmp_path, monkeypatch):
    """Each as it stands, but with a net, pictures and epochs of a size for a test."""
    fit, seen = training.fit, []

    def small(config: Config):
        seen.append(config)
        sizes = tuple(range(64, 129, 32)) if config.multiscale_sizes else ()
        return fit(config.replace(width=0.125, image_size=64, multiscale_sizes=sizes, epochs=1, batch_size=2, max_lr=1e-3,
                                  num_workers=0, cache_gb=0, precision="32-true", close_mosaic_epochs=0))  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "fit", small)
    one_of_each = "".join(obj(name) for name in ("mask", "no mask"))
    write_tree(tmp_path / "my_data", "2012", {"train": {"1": one_of_each, "2": one_of_each}, "val": {"3": one_of_each}})
    for year, splits in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        write_tree(tmp_path / "data", year, {split: {f"{split}{n}": obj() for n in range(2)} for split in splits})
    monkeypatch.setattr("src.config.PRESETS", {"voc": Config(data_root=str(tmp_path / "data"))})
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(seen) == 1 and (Path(seen[0].run_dir) / "best.ckpt").exists()
    assert len(DetectionDataModule(seen[0]).config.classes) in (2, 20)


def test_make_targets_and_linked_files_exist():
    for target in set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE)):
        name = "".join(target)
        assert subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True).returncode == 0, name
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
