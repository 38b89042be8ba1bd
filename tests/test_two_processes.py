"""Training in two processes on the CPU."""

import math
import multiprocessing
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training import fit as fitting
from src.training.fit import evaluate, fit, load_detector
from src.training.module import YOLOv3Module, sample_image_size
from src.training.run_folder import LAST, find_checkpoint
from tests.forking import MODULES
from tests.runs import epoch_rows, equal, load, metrics_rows, tiny

CONFIG = tiny(
    Path("run"),
    shapes_train=8,
    shapes_val=5,
    multiscale_sizes=(32, 64, 96),
    multiscale_interval=1,
    epochs=2,
    batch_size=2,
    devices=2,
)


class LoggedModule(YOLOv3Module):
    """Logs its process, image sizes, validations and renamed files to the file "events"."""

    def __init__(self, config: Config):
        super().__init__(config)
        for head in self.model.heads:  # scores above 0.01, although it is hardly trained
            head.predict.bias.data.view(3, -1)[:, 0] = -1.0
        sys.addaudithook(self.log_rename)
        self.model.register_forward_pre_hook(self.log_size)

    def log_event(self, *event) -> None:
        rank = dist.get_rank() if dist.is_initialized() else -1
        with open(Path(self.config.run_dir) / "events", "a") as file:
            print(rank, *event, file=file)

    def log_rename(self, event: str, args: tuple) -> None:
        if event == "os.rename":
            self.log_event("wrote", Path(args[1]).name)

    def log_size(self, network, inputs) -> None:
        if network.training:
            self.log_event("size", self.trainer.global_step, inputs[0].shape[-1])

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        images = [len(set(rows[:, 0])) for rows in (self.ground_truth, self.predictions)]
        total = self.predictions[:, 1:].sum()
        self.log_event("validated", len(self.ground_truth), *images, total)


class NaNModule(LoggedModule):
    """Has a loss of NaN in the last step of the second process."""

    def training_step(self, *args) -> torch.Tensor:
        is_nan = dist.get_rank() == 1 and self.trainer.global_step == 3
        return super().training_step(*args) * (math.nan if is_nan else 1)


def events(folder: Path, kind: str, rank: int) -> list[list[str]]:
    """Return what this process logged of one kind."""
    lines = [line.split() for line in (folder / "events").read_text().splitlines()]
    return [values for number, name, *values in lines if (number, name) == (str(rank), kind)]


@pytest.fixture(scope="module")
def two_processes():
    """Let `fit` fork its processes from a server that has imported everything: spawn is slower."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)
    fork = partial(torch.multiprocessing.start_processes, start_method="forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        patch.setattr(torch.multiprocessing, "spawn", fork)
        patch.setattr(fitting, "YOLOv3Module", LoggedModule)
        yield patch


@pytest.fixture(scope="module")
def whole(tmp_path_factory, two_processes):
    """The run folder and the detector of a run."""
    run = tmp_path_factory.mktemp("whole")
    return run, fit(CONFIG.replace(run_dir=str(run)))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, two_processes):
    """The same run, stopped by a loss that is not finite, and resumed."""
    run = tmp_path_factory.mktemp("resumed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "YOLOv3Module", NaNModule)
        with pytest.raises(ProcessRaisedException, match="loss is not finite in epoch 2"):
            fit(CONFIG.replace(run_dir=str(run)))
    checkpoint = load(find_checkpoint(run, "last"))
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    (run / "events").unlink()
    return run, fit(CONFIG.replace(run_dir=str(run)), ckpt_path="last")


@pytest.mark.parametrize(("run", "steps"), [("whole", range(4)), ("resumed", range(2, 4))])
def test_two_processes_give_the_results_of_one(request, run, steps):
    """Each validation image counts once, although one process has three and the other two.

    Only one process writes.
    """
    folder, _ = request.getfixturevalue(run)
    sizes = [[str(step), str(sample_image_size(CONFIG, step, step // 2))] for step in steps]
    assert [events(folder, "size", rank) for rank in (0, 1)] == [sizes, sizes]
    data = DetectionDataModule(CONFIG.replace(devices=1))
    one_process = evaluate(load_detector(folder, "last"), data)
    objects = sum(len(record.labels) for record in data.val_records)
    validated = [events(folder, "validated", rank) for rank in (0, 1)]
    assert validated[0] == validated[1]
    assert all(event[:3] == [str(objects), "5", "5"] for event in validated[0])
    total = one_process.predictions[:, 1:].sum()
    assert float(validated[0][-1][3]) == pytest.approx(total, rel=1e-4)
    expected = {f"val/accuracy/{name}": value for name, value in one_process.accuracies.items()}
    expected["val/mAP50"] = one_process.precisions["VOC AP@.5, area"]
    last = epoch_rows(folder)[-1]
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert {"metrics.csv", LAST} <= {name for (name,) in events(folder, "wrote", 0)}
    assert not events(folder, "wrote", 1)


def test_a_stopped_and_resumed_run_has_the_same_result(whole, resumed):
    assert equal(whole[1].state_dict(), resumed[1].state_dict())
    rows = metrics_rows(whole[0])
    assert rows == metrics_rows(resumed[0]) and len(rows) == 3  # one of the learning rate
    assert resumed[1].model.metadata["epochs"] == "2 of 2"
