"""torch.compile: how often it compiles, and checkpoints with and without it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from src.config import Config
from src.model.network import YOLOv3
from src.training import module
from src.training.fit import fit
from src.training.module import YOLOv3Module, build_model
from tests.test_training import fail_in, tiny


class OneConvolution(torch.nn.Module):
    """Stands in for YOLOv3: a backbone of one convolution, which compiles in milliseconds."""

    def __init__(self, _: Config):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)


def shallow_model(config: Config) -> YOLOv3:
    """YOLOv3 without its residual blocks, which compiles in a second."""
    model = build_model(config)
    model.backbone.stages = torch.nn.ModuleList(stage[:1] for stage in model.backbone.stages)
    return model


def use_backend(monkeypatch, backend) -> None:
    """Let torch.compile trace the network as usual and compile it with `backend`."""
    torch_compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: torch_compile(function, backend=backend, **options),
    )
    torch._dynamo.reset()


def test_seven_image_sizes_are_all_compiled(tmp_path, monkeypatch):
    """With a frozen backbone and without: 14 graphs, more than torch's default limit. A second pass compiles nothing."""
    counter, sizes = CompileCounter(), tuple(range(32, 256, 32))
    use_backend(monkeypatch, counter)
    monkeypatch.setattr(module, "build_model", OneConvolution)
    detector = YOLOv3Module(tiny(tmp_path, compile=True, multiscale_sizes=sizes))
    for _ in range(2):
        for trainable in (False, True):
            detector.model.backbone.requires_grad_(trainable).train(trainable)
            for size in sizes:
                detector.training_forward(torch.rand(2, 3, size, size))
        assert counter.frame_count == 14 == 2 * len(sizes)


def test_compile_can_change_when_a_run_is_resumed(tmp_path, monkeypatch):
    """The backend "eager" computes as without torch.compile, so the weights are those of an uncompiled run."""
    use_backend(monkeypatch, "eager")
    monkeypatch.setattr(module, "build_model", shallow_model)
    uninterrupted = fit(tiny(tmp_path / "uncompiled", epochs=2))
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        fail_in(patch, epoch=1)
        fit(tiny(tmp_path / "resumed", epochs=2, compile=True))
    resumed = fit(tiny(tmp_path / "resumed", epochs=2), ckpt_path="last")
    for name, value in uninterrupted.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
