"""`python -m benchmarks gpu`: all parts with tiny settings on the CPU, and what it writes if a part fails."""

import json

import pytest
import torch

from benchmarks import gpu, gpu_parts, gpu_training, memory
from src.config import VOC_CLASSES, Config
from src.training.memory import USABLE, training_gb
from tests.test_voc import obj, write_tree

TINY = ["--size", "64", "--width", "0.0625", "--batch", "2", "--seconds", "0.1"]


def run(folder, *arguments) -> tuple[int, dict[str, list[dict]]]:
    """The exit status, and the results of each part."""
    with pytest.raises(SystemExit) as status:
        gpu.main([*arguments, *TINY, "--out", str(folder)])
    return status.value.code, {
        path.stem: json.loads(path.read_text())["results"] for path in folder.glob("*.json")
    }


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """VOC_ROOT with six training and two validation images; caches in the test's folder."""
    for name, stems in {"train": "123456", "val": "78"}.items():
        write_tree(
            tmp_path / "voc", "2007", {name: {stem: obj(VOC_CLASSES[int(stem)]) for stem in stems}}
        )
    monkeypatch.setenv("VOC_ROOT", str(tmp_path / "voc"))
    monkeypatch.setattr("src.data.cache.FOLDER", tmp_path / "cache")


def test_smoke_loader_and_train(tmp_path, voc):
    status, results = run(
        tmp_path / "out",
        "train",
        "smoke",
        "loader",
        "--epochs",
        "1",
        "--max-lr",
        "1e-3",
        "--minutes",
        "5",
    )
    assert status == 0 and set(results) == {"smoke", "loader", "train"}
    assert results["smoke"][0]["torch"] == torch.__version__
    assert (
        results["loader"][0]["samples_per_s"] > 0 and "unknown" in results["loader"][-1]["result"]
    )
    trial, training, evaluation = results["train"]
    assert (
        trial["images"] == 6
        and trial["val_images"] == 2
        and min(trial["image_s"], trial["val_image_s"]) > 0
    )
    assert (
        set(evaluation["accuracies"]) >= {"class", "object@0.05"}
        and "1 epochs" in training["measured"]
    )
    out = tmp_path / "out"
    weights = {path.name for path in (out / "weights").iterdir()}
    assert weights == {"README.md", "config.json", "metrics.csv", "model.safetensors", "run.json"}
    assert (out / "train/metrics.csv").exists() and not list(out.glob("*/*.ckpt"))
    lines = (out / "results.md").read_text().splitlines()
    assert len(lines) == 2 + sum(map(len, results.values())) and {
        line.count("|") for line in lines
    } == {4}


def test_throughput(tmp_path):
    status, results = run(tmp_path, "throughput")
    rate, fastest = results["throughput"]
    assert status == 0 and rate["images_per_s"] > 0 and 0 < rate["outside"] < 1
    assert fastest["images_per_s"] == rate["images_per_s"]


def test_a_failing_part_does_not_stop_the_next(tmp_path, monkeypatch):
    """A part that raises, one that runs out of time and one without data, each after or before others."""

    def fails(options, seconds):
        yield {"measured": "first", "result": "1"}
        raise RuntimeError("no such\nluck")

    def never_ends(options, seconds):
        yield {"measured": "first", "result": "1"}
        while True:
            pass

    monkeypatch.setitem(gpu.PARTS, "smoke", fails)
    monkeypatch.setitem(gpu.PARTS, "throughput", never_ends)
    monkeypatch.delenv("VOC_ROOT", raising=False)
    status, results = run(tmp_path, "smoke", "throughput", "train", "--minutes", "0.05")
    assert status == 1 and [len(rows) for rows in results.values()].count(2) == 2
    assert results["smoke"][1]["result"] == "RuntimeError: no such luck"
    assert results["throughput"][1]["result"].startswith("PartTimeout")
    assert results["train"][0]["result"].startswith("skipped: VOC_ROOT")


def test_epochs_that_fit():
    """Per epoch 100 + 20 + 5 seconds; 100 for the range test, 80 for the last evaluation and 20 to start."""
    trial = {
        "images": 1000,
        "image_s": 0.1,
        "val_images": 200,
        "val_image_s": 0.1,
        "checkpoint_s": 5.0,
    }
    config = Config(batch_size=10, max_lr=0.0)
    for seconds, epochs in ((1000, 5), (100_000, 678)):
        assert gpu_training.plan_epochs(config, trial, seconds, 0) == epochs
        assert epochs * 125 + 200 <= 0.85 * seconds < (epochs + 1) * 125 + 200
    assert gpu_training.plan_epochs(config, trial, 1000, 3) == 3
    with pytest.raises(RuntimeError, match="An epoch takes about 125 s, but only 300 s remain"):
        gpu_training.plan_epochs(config, trial, 300, 3)


@pytest.mark.parametrize("width", memory.WIDTHS)
@pytest.mark.parametrize("size", memory.SIZES)
def test_largest_batch_that_fits(width, size):
    config = Config(width=width, image_size=size, precision="16-mixed")
    *_, largest, accumulate = memory.estimate(config)
    limit = USABLE * memory.CARD_GB
    assert training_gb(config, int(largest)) <= limit < training_gb(config, 2 * int(largest))
    assert accumulate == "1" if int(largest) >= 32 else int(largest) * int(accumulate) == 32


def test_required_workers(tmp_path):
    path = tmp_path / "throughput.json"
    path.write_text(
        json.dumps(
            {"results": [{"images_per_s": 900.0}, {"images_per_s": 700.0}, {"result": "failed"}]}
        )
    )
    assert gpu_parts.required_workers(path, {1: 400.0, 2: 800.0, 4: 1500.0})["workers"] == 4
    assert "not reached by 2" in gpu_parts.required_workers(path, {1: 400.0, 2: 800.0})["result"]
