"""The comparison with other implementations: its protocol, its table and its data, without another implementation."""

import sys

import pytest
import torch

from benchmarks.peers import compare
from benchmarks.peers.serve import CANDIDATES, bias_shift, calibrate_batch_norm
from src.config import SHAPE_CLASSES, Config
from src.data.datamodule import DetectionDataModule


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "WORK", tmp_path)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "TRAIN_IMAGES", 4)
    return tmp_path


FAKE = """
import time
from benchmarks.peers.serve import serve

def start(settings):
    print("noise")
    fail = lambda: 1 / 0
    jobs = {"train float32": lambda: lambda: (time.sleep(0.01), 4)[1], "validate": lambda: fail}
    return {"name": "fake", "parameters": 2_000_000, "gflop": 1.5}, jobs

serve(start)
"""


def test_a_peer_answers_and_reports_errors(work, monkeypatch):
    (work / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(compare.Path(__file__).resolve().parents[1]))
    peer = compare.Peer("fake", sys.executable, "fake", {"cores": 1})
    assert peer.info == {"name": "fake", "parameters": 2_000_000, "gflop": 1.5}
    answer = peer.run("train float32", 0.05)
    assert 0.0025 <= answer["seconds"] < 0.25 and answer["memory"] > 10
    assert (
        "ZeroDivisionError" in peer.run("validate", 0)["error"]
        and "KeyError" in peer.run("unknown", 0)["error"]
    )
    assert (
        peer.run_alone("train float32")["memory"] > 10
        and "ZeroDivisionError" in peer.run_alone("validate")["error"]
    )
    peer.process.kill()
    assert "noise" in peer.log.read_text() and "error" in peer.run("validate", 0)


def test_a_peer_that_does_not_start_is_skipped_with_its_reason(work, monkeypatch, capsys):
    (work / "broken.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(compare.PeerError, match=r"no such model \(see broken.log\)"):
        compare.Peer("broken", sys.executable, "broken", {"cores": 1})

    def no_network(name):
        raise compare.PeerError("pip install failed: no network")

    monkeypatch.setattr(compare, "install", no_network)
    monkeypatch.setattr(compare, "Peer", lambda name, *_: name)
    assert compare.start_peers({"cores": 1}, "checkout") == ["ours"]
    errors = capsys.readouterr().err
    assert (
        "ultralytics is skipped: pip install failed: no network" in errors
        and "reference is skipped" in errors
    )


def test_rows_compare_with_the_first_peer():
    answers = [
        {"seconds": 0.01, "memory": 100.0},
        {"seconds": 0.02, "memory": 50.0},
        {"error": "x"},
    ]
    results = dict.fromkeys(
        [*compare.JOBS, *(f"{job} alone" for job in compare.MEMORY_OF)], answers
    )
    rows = compare.rows(results, 2)
    assert rows[0] == [
        "training step, float32",
        "2",
        "100.0 images/s",
        "50.0 images/s (2.00)",
        "failed",
    ]
    assert rows[4] == ["validation per image", "2", "10.0 ms", "20.0 ms (2.00)", "failed"]
    assert rows[7] == ["peak memory, training step", "2", "100 MB", "50 MB (0.50)", "failed"]


def test_data_are_a_yolo_data_set(work):
    root = compare.write_data(3)
    data = DetectionDataModule(Config(data_root=str(root), image_size=64, cache_gb=0))
    data.setup()
    assert data.config.classes == SHAPE_CLASSES and (
        len(data.train_records),
        len(data.val_records),
    ) == (4, 3)
    assert sum(len(record.labels) for record in data.train_records) > 0
    assert len((root / "val.csv").read_text().splitlines()) == 4
    assert compare.write_data(3) == root


def test_calibration():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5000, generator=random)
    shift = bias_shift(lambda shift: (logits + shift).sigmoid(), 0.01, images=2)
    assert ((logits + shift).sigmoid() > 0.01).sum() == pytest.approx(2 * CANDIDATES, abs=2)
    norm = torch.nn.BatchNorm2d(3)
    images = torch.rand(4, 3, 8, 8, generator=random) * 5
    calibrate_batch_norm(torch.nn.Sequential(norm), images)
    torch.testing.assert_close(norm.running_mean, images.mean(dim=(0, 2, 3)))
    assert norm.momentum == 0.1 and not norm.training
