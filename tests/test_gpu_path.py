"""What a GPU would do, on the CPU: float16 with a gradient scaler, two devices, no waiting."""

import warnings
import weakref
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.multiprocessing import ProcessRaisedException

from src.data.datamodule import DetectionDataModule
from src.serving.predictor import Predictor
from src.training.callbacks import EMA, Progress
from src.training.devices import explain_out_of_memory, make_trainer
from src.training.fit import evaluate, fit
from src.training.loss import YOLOLoss
from src.training.lr_finder import find_lr
from src.training.module import YOLOv3Module
from tests.runs import epoch_rows, equal, fail_in, load, tiny
from tests.simulated_gpu import GPU, simulate_gpu

MULTISCALE = {"multiscale_sizes": (32, 64), "multiscale_interval": 1}


def use_float16(monkeypatch, scale: float) -> None:
    """Let the Trainer compute in float16 on the CPU; the gradient scaler starts at `scale`."""
    make = pl.Trainer

    def make_half(**options) -> pl.Trainer:
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        return make(**options | {"precision": None, "plugins": [*options.get("plugins", []), half]})

    monkeypatch.setattr(pl, "Trainer", make_half)


def losses(folder) -> list[float]:
    """Training and validation loss of each epoch."""
    return [float(row[name]) for row in epoch_rows(folder) for name in ("train/loss", "val/loss")]


def test_float16_gives_the_loss_curve_of_float32(tmp_path, monkeypatch):
    """Within 1 %. A scale of 2**10 does not overflow, so no step is skipped."""
    fit(tiny(tmp_path / "float32", **MULTISCALE))
    use_float16(monkeypatch, 2.0**10)
    fit(tiny(tmp_path / "float16", **MULTISCALE))
    assert load(tmp_path / "float16/last.ckpt")["MixedPrecision"]["scale"] == 2.0**10
    assert losses(tmp_path / "float16") == pytest.approx(losses(tmp_path / "float32"), rel=0.01)
    assert losses(tmp_path / "float16") != losses(tmp_path / "float32")


def test_overflowing_steps_are_skipped_and_the_scale_is_resumed(tmp_path, monkeypatch):
    """The first steps overflow at a scale of 2**22: no warning, and the weights don't change."""
    use_float16(monkeypatch, 2.0**22)
    scales, weights = [2.0**22], [YOLOv3Module(tiny(tmp_path)).model.backbone.stem[0].weight]

    def record(self, trainer, module, *_):
        scales.append(trainer.precision_plugin.scaler.get_scale())
        weights.append(module.model.backbone.stem[0].weight.detach().clone())

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(Progress, "on_train_batch_end", record)
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        uninterrupted = fit(tiny(tmp_path / "uninterrupted"))
    skipped = [now < before for before, now in pairwise(scales)]
    assert skipped == [torch.equal(*two) for two in pairwise(weights)]
    assert skipped[0] and not skipped[-1] and len(skipped) == 12
    assert all(value.isfinite().all() for value in uninterrupted.state_dict().values())
    with monkeypatch.context() as patch:
        fail_in(patch, epoch=1)
        with pytest.raises(ConnectionError):
            fit(tiny(tmp_path / "resumed"))
    resumed = fit(tiny(tmp_path / "resumed"), ckpt_path="last")
    scalers = [load(tmp_path / f"{name}/last.ckpt") for name in ("resumed", "uninterrupted")]
    assert scalers[0]["MixedPrecision"] == scalers[1]["MixedPrecision"]
    assert equal(uninterrupted.state_dict(), resumed.state_dict())


def train_one_epoch(config, waits: list[str]) -> tuple[YOLOv3Module, list[str], dict]:
    """Train one epoch; return the module, the waits before the validation, and the metrics."""
    module, training = YOLOv3Module(config), []
    recorder = LambdaCallback(
        on_train_epoch_start=lambda *_: waits.clear(),
        on_validation_start=lambda *_: training.extend(waits),
    )
    trainer = make_trainer(config, max_epochs=1, callbacks=[recorder, EMA(config.ema_decay)])
    trainer.fit(module, datamodule=DetectionDataModule(config))
    return module, training, {name: float(v) for name, v in trainer.callback_metrics.items()}


def test_training_steps_never_wait_for_the_gpu(tmp_path, monkeypatch):
    """Results equal the CPU's."""
    monkeypatch.setattr("src.training.metrics.MIN_SCORE", 1e-5)  # untrained networks score 1e-4
    config = tiny(tmp_path, width=0.0625, shapes_train=12, shapes_val=2, epochs=2, **MULTISCALE)
    on_cpu, _, expected = train_one_epoch(config, [])
    with simulate_gpu() as waits:
        module, training, metrics = train_one_epoch(config, waits)
    assert not training and waits  # the validation may wait
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert {"train/loss", "val/mAP50"} <= metrics.keys()
    np.testing.assert_allclose(module.ground_truth, on_cpu.ground_truth)
    assert len(module.predictions) == len(on_cpu.predictions) > 0


def test_simulated_gpu_counts_waits_and_refuses_mixed_devices():
    with simulate_gpu() as waits:
        values = torch.arange(4.0).to(GPU, non_blocking=True)
        assert not waits and (values * 2).exp().device == GPU
        for number, wait in enumerate(
            (
                values[0].item,
                values.tolist,
                values.cpu,
                values.nonzero,
                lambda: values[values > 1],
                lambda: bool(values[0]),
                lambda: torch.tensor(1.0, device=GPU),
                lambda: values.copy_(torch.ones(4)),
            ),
            start=1,
        ):
            wait()
            assert len(waits) == number
        for mixed in (
            lambda: values + torch.ones(4),
            lambda: values[torch.arange(2)],
            lambda: torch.ones(4).add_(values),
        ):
            with pytest.raises(RuntimeError, match="a tensor on the CPU meets one on the GPU"):
                mixed()


def test_predictor_on_the_gpu_also_after_an_evaluation(tmp_path):
    """Lightning moves the detector's network to the CPU, the evaluation back to the GPU."""
    detector = YOLOv3Module(tiny(tmp_path, shapes_val=2))
    for head in detector.model.heads:  # detections, although it is not trained
        head.predict.bias.data.view(3, -1)[:, 0] = 3.0
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    expected = Predictor(detector.model, device="cpu")(image, confidence=0)
    assert len(expected)
    with simulate_gpu():
        used, unused = (Predictor(detector.model, device=GPU) for _ in range(2))
        before = used.candidates(image).detections(0)
        evaluate(detector, DetectionDataModule(detector.config))
        after = unused.candidates(image).detections(0)  # it fuses batch norms now
    for detections in (before, after):
        np.testing.assert_allclose(detections.boxes, expected.boxes, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(detections.labels, expected.labels)


def test_out_of_memory_names_the_settings_and_frees_the_memory(tmp_path, monkeypatch):
    """The failed training's tensors are gone, although the error and the data module exist."""
    references, config = [], tiny(tmp_path, max_lr=0.0)
    data = DetectionDataModule(config)
    original = YOLOLoss.forward

    def out_of_memory(self, logits, *inputs):
        references.extend((weakref.ref(self), weakref.ref(logits[0])))
        if len(references) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, logits, *inputs)

    monkeypatch.setattr(YOLOLoss, "forward", out_of_memory)
    message = r"batch_size 4\. Halve it and double accumulate_grad_batches .* image_size"
    for function, max_lr in ((find_lr, 0.0), (fit, 0.0), (fit, 1e-3)):
        references.clear()
        with pytest.raises(torch.OutOfMemoryError, match=message) as error:
            function(config.replace(max_lr=max_lr), data)
        assert error.value.__context__ is None and len(references) == 6
        assert all(reference() is None for reference in references)


@pytest.mark.parametrize("name", ["OutOfMemoryError", "ValueError"])
def test_out_of_memory_in_one_of_several_processes(tmp_path, name):
    """`fit` gets the traceback of the process, as text."""

    @explain_out_of_memory
    def train(config, data):
        raise ProcessRaisedException(f"Traceback: torch.{name}: 2.00 GiB", 0, 1)

    expected = torch.OutOfMemoryError if name == "OutOfMemoryError" else ProcessRaisedException
    with pytest.raises(expected, match="Halve it" if name == "OutOfMemoryError" else name):
        train(tiny(tmp_path))
