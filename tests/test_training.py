"""Training: the files it writes, resuming, and the errors it raises."""

import copy
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from src.config import SHAPE_CLASSES, Config
from src.data.datamodule import DetectionDataModule, ValDataset, collate
from src.data.mosaic import MosaicDataset
from src.data.records import make_record
from src.model.network import YOLOv3
from src.model.pretrained import transfer_weights
from src.serving.images import to_network_input
from src.training import callbacks, lr_finder
from src.training.callbacks import EMA
from src.training.devices import resolve_precision
from src.training.fit import evaluate, fit, load_detector
from src.training.lr_finder import find_lr
from src.training.module import YOLOv3Module, sample_image_size
from src.training.optimizer import OneCycleModule
from tests.runs import epoch_rows, equal, fail_in, load, metrics_rows, tiny


def test_run_writes_config_metrics_and_checkpoints(trained_run):
    names = {file.name for file in trained_run.iterdir()}
    assert {"config.json", "metrics.csv", "best.ckpt", "last.ckpt"} <= names
    assert Config.load(trained_run / "config.json") == tiny(trained_run)
    columns = {f"val/accuracy/{name}" for name in ("class", "object@0.05", "no_object@0.5")}
    for term in ("loss", "box", "objectness", "background", "class"):
        columns |= {f"train/{term}", f"val/{term}"}
    rows = epoch_rows(trained_run)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(row[name] for row in rows for name in columns)


def test_best_checkpoint_and_accumulated_batches(trained_run, tmp_path, monkeypatch, capsys):
    """Batches of 2, two per step: the steps and learning rates of batches of 4.

    The log is written once per epoch; one row per epoch is printed.
    """
    writes = mock.Mock(wraps=callbacks.atomic_write)
    monkeypatch.setattr(callbacks, "atomic_write", writes)
    ids, get = [], MosaicDataset.__getitem__
    monkeypatch.setattr(MosaicDataset, "__getitem__", lambda data, n: ids.append(n) or get(data, n))
    with mock.patch("src.training.module.mean_average_precision", side_effect=[0.1, 0.3, 0.2]):
        accumulated = fit(tiny(tmp_path, batch_size=2, accumulate_grad_batches=2))
    assert writes.call_count == 3
    assert sorted(ids) == [*range(3 * 16)]  # each image once per epoch
    printed = re.findall(r"epoch  (\d)  .*  mAP50 (0.\d+)\n", capsys.readouterr().out)
    assert printed == [("1", "0.100"), ("2", "0.300"), ("3", "0.200")]
    best, last = (load(tmp_path / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (1, 2)
    assert accumulated.trainer.global_step == 12 and accumulated.lr_schedulers().total_steps == 12
    rows = [metrics_rows(path) for path in (trained_run, tmp_path)]
    steps = [[(row["step"], row["lr"]) for row in run] for run in rows]
    assert steps[0] == steps[1]
    assert last["callbacks"]["EMA"] == {"latest_update_step": 12}


def onecycle_rates(warmup: float, total_steps: int) -> list[float]:
    """Learning rates of all steps of a schedule with the peak 1e-3."""
    module = OneCycleModule(Config(max_lr=1e-3, warmup_fraction=warmup))
    module.layer = torch.nn.Linear(2, 2)
    module._trainer = SimpleNamespace(estimated_stepping_batches=total_steps)
    optimized = module.configure_optimizers()
    scheduler, rates = optimized["lr_scheduler"]["scheduler"], []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimized["optimizer"].step()
        if len(rates) < total_steps:
            scheduler.step()
    return rates


def test_training_changes_the_learning_rate_every_step(trained):
    """All 12 steps are of OneCycle; the log has the first and the eleventh."""
    logged = [float(row["lr"]) for row in metrics_rows(trained[0]) if row["lr"]]
    rates = onecycle_rates(0.1, 12)
    assert logged == pytest.approx([rates[0], rates[10]]) and len(set(rates)) == 12


def test_onecycle_has_its_peak_at_the_end_of_the_warm_up():
    """10 steps have exactly one step of warm-up."""
    for warmup, peak in ((0.1, 3), (0.25, 9), (0.5, 19)):
        rates = onecycle_rates(warmup, 40)
        assert rates.index(max(rates)) == peak and max(rates) == pytest.approx(1e-3)
        assert rates[0] == pytest.approx(1e-3 / 25)
    assert onecycle_rates(0, 10)[0] > 9e-4
    for total_steps in range(1, 31):
        rates = onecycle_rates(0.1, total_steps)
        assert 0 < max(rates) <= 1e-3 and rates[-1] < 1e-5


@pytest.mark.parametrize("limit, norm", [(2.0, 2.0), (0.0, 5.0), (10.0, 5.0)])
@pytest.mark.parametrize("scale", [1, 1024])  # of float16's gradients, which are unscaled before
def test_gradients_are_clipped_to_the_norm(tmp_path, limit, norm, scale):
    module = OneCycleModule(tiny(tmp_path, gradient_clip_val=limit))
    module.layer = torch.nn.Linear(1, 1)
    module.layer.weight.grad = torch.tensor([[3.0 * scale]])
    module.layer.bias.grad = torch.tensor([4.0 * scale])

    def unscale(_):
        for parameter in module.parameters():
            parameter.grad /= scale

    plugin = SimpleNamespace(scaler=SimpleNamespace(unscale_=unscale)) if scale > 1 else None
    module._trainer = SimpleNamespace(precision_plugin=plugin)
    module.configure_gradient_clipping(None)
    gradient = torch.cat((module.layer.weight.grad[0], module.layer.bias.grad))
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-4)


def test_ema_equals_its_definition():
    """Step n, from 0, has the decay min(0.5, (1 + n) / (10 + n)); the first weights are copied."""
    module, ema = torch.nn.BatchNorm1d(1), EMA(0.5)
    ema._average_model = SimpleNamespace(module=torch.nn.BatchNorm1d(1))
    expected = 0.0
    for step, value in enumerate(np.random.default_rng(0).normal(size=15)):
        module.weight.data.fill_(value)
        module.running_mean.fill_(value)
        ema.on_train_batch_end(SimpleNamespace(global_step=step + 1), module)
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * value
        average = ema._average_model.module
        assert average.weight.item() == average.running_mean.item() == pytest.approx(expected)


def test_checkpoints_contain_the_averaged_weights(trained):
    folder, detector = trained
    checkpoint = load(folder / "last.ckpt")
    averaged = checkpoint["state_dict"]
    name = "model.backbone.stem.0.weight"
    assert not torch.equal(averaged[name], checkpoint["current_model_state"][name])
    for model in (detector, load_detector(folder, "last")):
        assert torch.equal(model.state_dict()[name], averaged[name])


def test_evaluation_and_metadata_have_every_metric(trained):
    folder, detector = trained
    data = DetectionDataModule(tiny(folder))
    loaded = load_detector(folder, "last")
    evaluation = evaluate(loaded, data)
    metadata = loaded.model.metadata
    assert metadata == detector.model.metadata
    assert metadata["data"] == "synthetic data set training" and metadata["epochs"] == "3 of 3"
    accuracies, precisions = evaluation.accuracies, evaluation.precisions
    expected = {
        "mAP50": precisions["VOC AP@.5, area"],
        "class accuracy": accuracies["class"],
        "object accuracy": accuracies["object@0.05"],
        "no-object accuracy": accuracies["no_object@0.05"],
        "objectness threshold": 0.05,
    }
    assert metadata["metrics"] == pytest.approx(expected)
    assert set(accuracies) == {
        "class",
        *("object@0.05", "no_object@0.05", "object@0.5", "no_object@0.5"),
    }
    names = {"VOC AP@.5, area", "VOC AP@.5, 11 points", "course mAP@.5"}
    assert set(precisions) == names | {"COCO AP@.5", "COCO AP@.5:.95"}
    truth = [  # images are drawn at 192 pixels
        [number, label, difficult, *box / 192]
        for number, record in enumerate(data.val_records)
        for box, label, difficult in zip(*record[1:], strict=True)
    ]
    np.testing.assert_allclose(evaluation.ground_truth, truth, atol=1e-5)
    splits = (data.train_records, data.val_records)
    train, val = ({record.image.tobytes() for record in split} for split in splits)
    assert not train & val
    assert len(evaluation.per_class) == len(SHAPE_CLASSES)
    others = DetectionDataModule(tiny(folder, classes=SHAPE_CLASSES[::-1]))
    message = r"The detector's classes are \('circle'.*DetectionDataModule\(detector.config\)"
    with pytest.raises(ValueError, match=message):
        evaluate(detector, others)


def test_weight_decay_applies_to_kernels_only(trained):
    groups = trained[1].configure_optimizers()["optimizer"].param_groups
    decays = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {4: 0.05, 1: 0.0}


def test_interrupted_run_gives_the_same_result(trained, tmp_path, monkeypatch):
    folder, uninterrupted = trained
    with monkeypatch.context() as patch:
        fail_in(patch, epoch=1)
        with pytest.raises(ConnectionError):
            fit(tiny(tmp_path))
    resumed = fit(tiny(tmp_path), ckpt_path="last")
    assert equal(uninterrupted.state_dict(), resumed.state_dict())
    assert metrics_rows(folder) == metrics_rows(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ("a", "b")},
        {"epochs": 5},
        {"mosaic_prob": 0.5},
        {"devices": 2},
        {"ema_decay": 0.9},
    ],
)
def test_resuming_needs_the_same_settings(trained_run, change):
    ((name, value),) = change.items()
    before = (trained_run / "config.json").read_text()
    message = rf"Config.{name} is {re.escape(str(value))}, but .*config.json was started with "
    with pytest.raises(ValueError, match=message):
        fit(tiny(trained_run, **change), ckpt_path="last")
    assert (trained_run / "config.json").read_text() == before


def test_resuming_needs_the_same_number_of_images(trained_run, tmp_path):
    """As if the data set had changed: settings are the same, the schedule isn't."""
    shutil.copytree(trained_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "last.ckpt").unlink()
    data = DetectionDataModule(tiny(tmp_path))
    data.setup()
    data.train_data.records = data.train_data.records + data.train_data.records[:4]
    with pytest.raises(ValueError, match=r"schedule has 12 steps, the data now give 15"):
        fit(tiny(tmp_path), data, ckpt_path="last")


def test_data_module_of_another_config_is_refused(tmp_path):
    config = tiny(tmp_path)
    for function in (fit, find_lr):
        with pytest.raises(
            ValueError,
            match=r"created with Config.batch_size = 4, but the config has 8. Create a new one",
        ):
            function(config.replace(batch_size=8), DetectionDataModule(config))
    DetectionDataModule(config).check_matches(
        config.replace(max_lr=0.1, run_dir="elsewhere", num_workers=1)
    )


def test_range_test_has_the_effective_batch_of_all_devices_and_no_side_effects(tmp_path):
    """Two batches per step, each at the rate of its step. No file is written."""
    step, rates = YOLOv3Module.training_step, []

    def record(self, *args):
        rates.append({group["lr"] for group in self.optimizers().param_groups})
        return step(self, *args)

    results = []
    for change in ({"devices": 2}, {"accumulate_grad_batches": 2}):
        config = tiny(tmp_path, max_lr=0.0, batch_size=2, **change)
        patches = mock.patch.object(YOLOv3Module, "training_step", record)
        with patches, mock.patch.object(lr_finder, "suggest_lr", return_value=1):
            results.append(find_lr(config, DetectionDataModule(config), steps=6))
    expected = np.geomspace(1e-5, 0.1, 6)
    assert rates == 2 * [{rate} for rate in expected for _ in range(2)]
    assert results[0] == results[1] and not list(tmp_path.iterdir())
    assert results[0].rates == expected[: len(results[0].losses)].tolist()
    assert results[0].suggestion == expected[1]


def test_max_lr_0_takes_the_suggestion_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    finder = mock.Mock(return_value=SimpleNamespace(suggestion=5e-4))
    monkeypatch.setattr("src.training.fit.find_lr", finder)
    for ckpt_path in (None, "last"):
        detector = fit(tiny(tmp_path, max_lr=0.0, epochs=1), ckpt_path=ckpt_path)
        assert detector.config.max_lr == Config.load(tmp_path / "config.json").max_lr == 5e-4
    assert finder.call_count == 1


def test_range_test_ends_at_divergence():
    falling = np.linspace(10, 6, 60)
    means = [falling[max(0, i - 7) : i + 8].mean() for i in range(60)]
    assert lr_finder.smooth_until_divergence(falling) == pytest.approx(means)
    for diverging in (np.full(20, 13.0), np.full(20, np.nan), np.array([1e6, *np.full(19, 5.0)])):
        means = lr_finder.smooth_until_divergence(np.concatenate((falling, diverging)))
        assert 50 <= len(means) < 70 and np.diff(means).max() < 1.0


def test_suggestion_measures_the_fall_from_the_maximum():
    assert lr_finder.suggest_lr(np.array([9.0, 8, 7, 4, 3, 2, 1, 0.5, 0, 5])) == 7
    assert lr_finder.suggest_lr(np.array([2.0, 9, 12, 10, 7, 4, 3, 9, 11])) == 6
    for not_falling in ([1.0, 2, 3], [2.0], []):
        with pytest.raises(RuntimeError, match="max_lr"):
            lr_finder.suggest_lr(np.array(not_falling))


def test_first_half_of_a_short_run_has_mosaics_and_all_sizes(tmp_path):
    for epochs, close_mosaic_epoch in ((1, 1), (3, 2), (4, 2), (8, 4), (40, 36)):
        config = tiny(tmp_path, epochs=epochs, close_mosaic_epochs=4, multiscale_sizes=(64, 96))
        assert config.close_mosaic_epoch == close_mosaic_epoch
        sizes = [
            {sample_image_size(config, step, epoch) for step in range(0, 400, 10)}
            for epoch in range(epochs)
        ]
        assert sizes == [{64, 96}] * close_mosaic_epoch + [{64}] * (epochs - close_mosaic_epoch)


def test_every_size_is_sampled_and_kept_for_the_interval(tmp_path):
    sizes = tuple(range(256, 449, 32))
    config = tiny(tmp_path, multiscale_sizes=sizes)
    sampled = np.array([sample_image_size(config, step, 0) for step in range(2000)])
    assert set(sampled) == set(sizes)
    intervals = sampled.reshape(-1, config.multiscale_interval)
    assert (intervals == intervals[:, :1]).all()


@pytest.mark.parametrize("size", [256, 288, 352, 448])
def test_resized_batch_equals_a_batch_read_at_that_size(size):
    """Compare training_step's resize of a batch of 448 pixels with a data set of `size` pixels."""
    config = Config(dataset="shapes", classes=SHAPE_CLASSES, width=0.125, multiscale_sizes=(size,))
    smooth = np.linspace(0, 255, 1664 * 832 * 3).reshape(832, 1664, 3).astype(np.uint8)
    corners = np.random.default_rng(size).uniform(0, 700, (20, 2))
    boxes = np.hstack((corners, corners + np.geomspace(30, 130, 20)[:, None]))
    record = make_record(smooth, boxes, [0] * 20, [False] * 20)
    batch, expected = (
        collate([ValDataset([record], config.replace(image_size=s))[0]]) for s in (448, size)
    )
    detector, inputs = YOLOv3Module(config), []
    detector.model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    detector._trainer = SimpleNamespace(global_step=0, current_epoch=0)
    detector.log_dict = lambda *_, **__: None
    detector.loss.forward = loss = mock.Mock(wraps=detector.loss.forward)
    detector.training_step(batch, 0)
    detector.eval().validation_step(expected, 0)
    for call in loss.call_args_list:  # anchors keep their pixels
        torch.testing.assert_close(call.args[3] * size, detector.model.anchors * 416)
    assert inputs[0].shape[-1] == size
    assert (inputs[0] - to_network_input(expected["images"])).abs().mean() < 0.005
    torch.testing.assert_close(batch["targets"], expected["targets"], atol=1e-6, rtol=0)


def test_a_process_with_fewer_images_than_a_batch_has_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("src.data.datamodule.world_and_rank", lambda: (2, 0))
    data = DetectionDataModule(tiny(tmp_path, shapes_train=6))
    data.setup()
    assert [len(batch["images"]) for batch in data.train_dataloader()] == [3]


def test_classes_in_common_keep_their_logits():
    source, target = YOLOv3(3, 0.05, ["a", "b", "c"]), YOLOv3(3, 0.05, ["c", "x", "a"])
    initial = copy.deepcopy(target)
    transfer_weights(target, source)
    rows = {"c": (5, 7), "a": (7, 5)}  # of target and source
    for head, old, new in zip(source.heads, initial.heads, target.heads, strict=True):
        for name in ("weight", "bias"):
            given, before, after = (
                getattr(part.predict, name).unflatten(0, (3, 8)) for part in (head, old, new)
            )
            assert torch.equal(after[:, :5], given[:, :5]) and torch.equal(
                after[:, 6], before[:, 6]
            )
            assert all(torch.equal(after[:, one], given[:, other]) for one, other in rows.values())


@pytest.mark.parametrize(
    ("gpu", "flags", "precision"),
    [
        (True, "avx512_bf16", "16-mixed"),
        (False, "avx512_bf16", "bf16-mixed"),
        (False, "amx_bf16", "bf16-mixed"),
        (False, "avx2", "32-true"),
    ],
)
def test_precision_depends_on_the_machine(monkeypatch, gpu, flags, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: flags)
    assert resolve_precision(Config()) == precision
    assert resolve_precision(Config(precision="64-true")) == "64-true"
