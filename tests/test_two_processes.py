"""Training in two processes on the CPU, started from a notebook and from a script."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training import devices
from src.training import fit as fitting
from src.training.devices import run_in_processes
from src.training.fit import evaluate, fit, load_detector
from src.training.module import YOLOv3Module
from src.training.run_folder import LAST
from tests.forking import MODULES, end_second_process
from tests.runs import epoch_rows, equal, metrics_rows, tiny

ROOT = Path(__file__).resolve().parents[1]
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
START = """\
import sys
from src.training import fit as fitting
from tests import test_two_processes
from tests.test_two_processes import *

fitting.YOLOv3Module = getattr(test_two_processes, sys.argv[2])
config = CONFIG.replace(run_dir=sys.argv[1])
"""
SCRIPT = START + 'fit(config, DetectionDataModule(config), ckpt_path="auto")\n'
CELLS = (  # in the order of the notebooks
    "import sys\nsys.argv = ['', {folder!r}, 'LoggedModule']\n" + START,
    "forks = []\nos.register_at_fork(before=lambda: forks.append(1))\n"
    "torch.cuda.is_initialized = lambda: True  # as if the GPU had been used\n"
    "torch.cuda.empty_cache = lambda: None\n"
    "data = DetectionDataModule(config)",
    "from src.training.lr_finder import find_lr\nlr_test = find_lr(config, data, steps=20)\n"
    "import weakref\ntested = weakref.ref(data.trainer.lightning_module)",
    "detector = fit(config, data)",
    "evaluation = evaluate(load_detector(config.run_dir, 'best'), data)\n"
    "fitted = evaluate(detector, data)\n"
    "torch.save(detector.state_dict(), f'{{config.run_dir}}/returned.pt')\n"
    "print(json.dumps([len(forks), tested() is None, len(lr_test.losses), fitted.accuracies]))",
)


class LoggedModule(YOLOv3Module):
    """Logs its process, image sizes, validations and renamed files to the file "events"."""

    def __init__(self, config: Config):
        super().__init__(config)
        sys.addaudithook(
            lambda event, args: (
                self.log_event("wrote", Path(args[1]).name) if event == "os.rename" else None
            )
        )
        self.model.register_forward_pre_hook(self.log_size)

    def log_event(self, *event) -> None:
        with open(Path(self.config.run_dir) / "events", "a") as file:
            file.write(
                " ".join(map(str, (dist.get_rank() if dist.is_initialized() else -1, *event)))
                + "\n"
            )

    def on_fit_start(self) -> None:
        self.log_event("started", os.getpid())

    def log_size(self, network, inputs) -> None:
        if network.training:
            self.log_event("size", self.trainer.global_step, inputs[0].shape[-1])

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log_event(
            "validated",
            len(self.ground_truth),
            len(set(self.ground_truth[:, 0])),
            self.map50,
        )


class WaitingModule(LoggedModule):
    """Waits in the second epoch."""

    def training_step(self, *args) -> torch.Tensor:
        time.sleep(600 if self.trainer.global_step == 2 else 0)
        return super().training_step(*args)


class NaNModule(LoggedModule):
    """Has a loss of NaN in the last step of the second process."""

    def training_step(self, *args) -> torch.Tensor:
        return super().training_step(*args) * (
            math.nan if dist.get_rank() == 1 and self.trainer.global_step == 3 else 1
        )


def events(folder: Path, kind: str, rank: int) -> list[list[str]]:
    """Return what this process logged of one kind."""
    lines = (line.split() for line in (folder / "events").read_text().splitlines())
    return [
        values
        for logged_rank, logged_kind, *values in lines
        if (logged_rank, logged_kind) == (str(rank), kind)
    ]


def start(*command, **options) -> subprocess.Popen:
    """Start a process of this interpreter that finds `src`.

    ipykernel shows no output of processes during a pytest test, so that must not be visible to it.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, text=True, **output, **options
    )


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The folder of a run from a notebook, and the text that each cell has printed."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [nbformat.v4.new_code_cell(cell.format(folder=str(folder / "run"))) for cell in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
    process = start(
        "-m", "tools.notebook", "run", folder / "in.ipynb", folder / "out.ipynb", cwd=ROOT
    )
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    return folder / "run", [
        "".join(output.get("text", "") for output in cell.outputs) for cell in cells
    ]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The folder of the same run, interrupted in a notebook and resumed by a script.

    Ctrl-C reaches the notebook's process alone. Before it, no other process can train there.
    """
    folder = tmp_path_factory.mktemp("script")
    run = folder / "run"
    process = start("-c", "import sys\nsys.ps1 = '>>> '\n" + SCRIPT, run, "WaitingModule")
    try:
        while not (run / LAST).exists():
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match="Another process is training"):
            fit(CONFIG.replace(run_dir=str(run)))
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert_ended(int(pid) for rank in (0, 1) for (pid,) in events(run, "started", rank))
    (folder / "script.py").write_text(SCRIPT)
    process = start(folder / "script.py", run, "LoggedModule")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    return run


def assert_ended(pids) -> None:
    """Assert that these two processes have ended."""
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False]


def test_a_notebook_trains_on_two_gpus_after_it_has_used_one(notebook):
    """The range test and the evaluation are in the notebook's process.

    It forks no other, and frees the range test's network.
    """
    folder, printed = notebook
    forks, freed, lr_steps, accuracies = json.loads(printed[-1].splitlines()[-1])
    assert forks == 0 and freed and lr_steps > 0 and "learning rates: 100%" in printed[2]
    lines = printed[3].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("   ")] == ["epoch", "1", "2"]
    assert "training: 100%" in lines[-1]
    assert "Warning" not in printed[3] and "distributed" not in printed[3]
    last = epoch_rows(folder)[-1]
    assert float(last["val/accuracy/class"]) == pytest.approx(accuracies["class"], abs=1e-6)


def test_an_interrupted_run_that_a_script_resumes_has_the_same_result(notebook, script):
    folder, _ = notebook
    weights = torch.load(folder / "returned.pt", weights_only=True)
    for run in (folder, script):
        assert equal(weights, load_detector(run, "last").state_dict())
    rows = metrics_rows(folder)
    assert rows == metrics_rows(script) and len(rows) == 3  # one of the learning rate
    assert load_detector(script, "last").model.metadata["epochs"] == "2 of 2"


@pytest.mark.parametrize("run", ["notebook", "script"])
def test_two_processes_give_the_results_of_one(notebook, script, run):
    """Each validation image counts once, although one process has three and the other two.

    Only one process writes.
    """
    folder = notebook[0] if run == "notebook" else script
    sizes = [events(folder, "size", rank) for rank in (0, 1)]
    assert sizes[0] == sizes[1] and [step for step, _ in sizes[0]] == list("0123")
    data = DetectionDataModule(CONFIG.replace(devices=1))
    one_process = evaluate(load_detector(folder, "last"), data)
    objects = sum(len(record.labels) for record in data.val_records)
    validated = [events(folder, "validated", rank) for rank in (0, 1)]
    assert validated[0] == validated[1]
    assert [event[:2] for event in validated[0]] == [[str(objects), "5"]] * 2
    last = epoch_rows(folder)[-1]
    map50 = one_process.precisions["VOC AP@.5, area"]
    assert float(last["val/mAP50"]) == pytest.approx(map50, abs=1e-6)
    for name, value in one_process.accuracies.items():
        assert float(last[f"val/accuracy/{name}"]) == pytest.approx(value, abs=1e-6), name
    assert {"metrics.csv", "best.ckpt", LAST} <= {name for (name,) in events(folder, "wrote", 0)}
    assert not events(folder, "wrote", 1)


@pytest.fixture
def fork(monkeypatch):
    """Fork training processes from a server that has imported everything, instead of spawning."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(MODULES)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    start_processes = partial(devices.mp.start_processes, start_method="forkserver")
    monkeypatch.setattr(devices.mp, "spawn", start_processes)


@pytest.mark.usefixtures("fork")
def test_non_finite_loss_in_one_process_stops_both(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)  # as in a notebook
    monkeypatch.setattr(fitting, "YOLOv3Module", NaNModule)
    with pytest.raises(ProcessRaisedException, match="The loss is not finite at step 4"):
        fit(CONFIG.replace(run_dir=str(tmp_path)))
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["epoch"] == 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert_ended(pid for rank in (0, 1) for (pid,) in events(tmp_path, "started", rank))


@pytest.mark.usefixtures("fork")
def test_the_end_of_one_process_ends_both(tmp_path):
    with pytest.raises(RuntimeError, match="process 1 terminated with signal SIGKILL.*too little"):
        run_in_processes(2, end_second_process, tmp_path)
    assert_ended(file.read_text() for file in tmp_path.iterdir())
