"""A simulated GPU: its tensors compute on the CPU, but must not meet the CPU's.

Reading them is recorded as a wait. PyTorch sees the device "meta", because autograd runs its
backward pass without a driver.
"""

import sys
from contextlib import ExitStack, contextmanager

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
)
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)


class GPUTensor(torch.Tensor):
    """A tensor on the simulated GPU; `data_on_cpu` holds its values."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {
            "strides": values.stride(),
            "storage_offset": values.storage_offset(),
            "dtype": values.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, device=GPU)

    def __init__(self, values: torch.Tensor):
        self.data_on_cpu = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called outside of simulate_gpu()")


class Dispatch(TorchDispatchMode):
    """Run each operation on the CPU, refuse mixed devices, and list in `waits` what waits."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_gpu = any(isinstance(tensor, GPUTensor) for tensor in tensors)
        on_cpu = any(not isinstance(tensor, GPUTensor) and tensor.dim() for tensor in tensors)
        if from_gpu and on_cpu and func not in COPIES:
            raise RuntimeError(f"{func}: a tensor on the CPU meets one on the GPU")
        to_gpu = from_gpu
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]) == GPU
            kwargs["device"] = torch.device("cpu")
        if func is aten.copy_.default:
            to_gpu = isinstance(args[0], GPUTensor)
            from_gpu = isinstance(args[1], GPUTensor)
        if waits(func, args, kwargs, from_gpu, to_gpu):
            self.waits.append(str(func))
        values = tree_map_only(GPUTensor, lambda tensor: tensor.data_on_cpu, (args, kwargs))
        result = func(*values[0], **values[1])
        if to_gpu:
            result = tree_map_only(torch.Tensor, GPUTensor, result)
        if from_gpu and to_gpu:
            return return_and_correct_aliasing(func, args, kwargs, result)
        return args[0] if func is aten.copy_.default else result


def waits(func, args: tuple, kwargs: dict, from_gpu: bool, to_gpu: bool) -> bool:
    """Return whether the CPU has to wait for the GPU's result, or for a copy."""
    if func in COPIES:
        return from_gpu != to_gpu and not (kwargs.get("non_blocking") or args[2:] == (True,))
    if func in INDEXING:
        return from_gpu and any(mask is not None and mask.dtype == torch.bool for mask in args[1])
    return from_gpu and func in READS


class Functions(TorchFunctionMode):
    """Replace functions that don't pass the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


class SimulatedAccelerator(CPUAccelerator):
    """Accept the simulated GPU as the Trainer's device."""

    def setup_device(self, device: torch.device) -> None:
        """Do nothing."""


@contextmanager
def simulate_gpu():
    """Yield the `waits` of the code within. Trainers use the GPU, in float32."""
    make, dispatch = pl.Trainer, Dispatch()

    def make_trainer(**options) -> pl.Trainer:
        strategy = SingleDeviceStrategy(device=GPU, accelerator=SimulatedAccelerator())
        return make(
            **options
            | {"strategy": strategy, "accelerator": "auto", "devices": 1, "precision": "32-true"}
            | {"inference_mode": False}  # whose tensors a wrapper can't be made of
        )

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(pl, "Trainer", make_trainer)
        patch.setattr(
            sys.modules["torch.optim.optimizer"],
            "_get_fused_kernels_supported_devices",
            lambda: ["cpu", GPU.type],
        )
        stack.enter_context(dispatch)
        stack.enter_context(Functions())
        yield dispatch.waits
