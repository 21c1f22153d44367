"""A GPU that exists only as a label: ordinary CPU tensors under CUDA's rules about devices.

    with FakeGpu() as gpu:
        ...            # `.to("cuda")` labels a tensor, and operators refuse inputs of two devices
    gpu.drawn          # random operators that ran on the device: another GPU draws other numbers

A table says which storages are "on the GPU". It is consulted at two levels:

- Python calls (`.to`, `.device`, `device=`, `.numpy()`): labels are set, reported, and conversions
  that CUDA refuses are refused.
- Operators below autograd: inputs on two devices are refused, except 0-d CPU tensors, copies and
  CPU indices; results inherit the label.

All numbers are computed by the CPU, so a run under it equals a CPU run bit for bit where dtypes and
algorithms are the same. It knows nothing of kernels that CUDA lacks or rounds differently, streams,
memory or bitsandbytes. FakeTensorMode cannot do this on a CPU build of torch: it can neither slice
a fake CUDA tensor nor run backward, and has no values.

Enter it after all libraries are imported, since some look for a GPU on import.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ANY = "any device"  # made inside autograd's engine, whose calls do not name a device

COPIES = {
    "aten.copy_.default",
    "aten._to_copy.default",
    "aten._foreach_copy_.default",
    "aten.set_.source_Tensor",
}
INDEXING = {
    "aten.index.Tensor",
    "aten.index_put.default",
    "aten.index_put_.default",
    "aten._index_put_impl_.default",
    "aten._unsafe_index.Tensor",
}
REFUSE_CPU_SCALARS = {"aten.cat.default", "aten.stack.default"}
RANDOM = (
    "aten.rand",
    "aten.normal",
    "aten.uniform",
    "aten.bernoulli",
    "aten.native_dropout",
    "aten.multinomial",
    "aten.exponential",
)

DEVICE, IS_CUDA, IS_CPU = (
    getattr(Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")
)
MOVES = {Tensor.to, Tensor.cuda, Tensor.cpu, Tensor.type_as}
NEW_ON_SAME_DEVICE = {
    Tensor.new_tensor,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
}

# Labels by storage, for the whole process: libraries cache tensors from one run to the next.
_LABELS: dict[int, object] = {}


class FakeGpu:
    """Context manager: while it is active, there is one GPU.

    drawn: names of the random operators that ran on the GPU. python_calls: devices of the Python
    calls that are running, innermost last; an operator without tensor inputs is on that device.
    """

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.python_calls: list[object] = []

    def __enter__(self) -> Self:
        self._stack, calls = ExitStack(), _PythonCalls(self)
        for patch in (*_cuda_module(), *_calls_from_cpp(calls)):
            self._stack.enter_context(patch)
        self._stack.enter_context(_fresh_accelerate_state())
        self._stack.enter_context(_Operators(self))
        self._stack.enter_context(calls)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def label_of(tensor: Tensor) -> object:
    """CPU, GPU, or ANY (also for tensors without storage)."""
    return ANY if _has_no_storage(tensor) else _LABELS.get(_storage_id(tensor), CPU)


def set_label(result: Any, label: object) -> Any:
    """Label all tensors in a result; returns the result."""
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor) and not _has_no_storage(tensor):
            key = _storage_id(tensor)
            if key not in _LABELS:
                weakref.finalize(tensor.untyped_storage(), _LABELS.pop, key, None)
            _LABELS[key] = label
    return result


def _has_no_storage(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Operators(TorchDispatchMode):
    """Refuses operators with inputs on two devices, and labels results like the inputs."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        tensors = _tensors(args, kwargs)
        if any(map(_has_no_storage, tensors)):
            return func(*args, **kwargs)
        labels = [label_of(tensor) for tensor in tensors]
        if GPU in labels and name not in COPIES:
            _refuse_mixed(name, tensors, labels)
        result = func(*args, **kwargs)

        # Where the result is
        if tensors:
            label = GPU if GPU in labels else ANY if ANY in labels else CPU
        else:
            label = self.gpu.python_calls[-1] if self.gpu.python_calls else CPU
        if label is GPU and name.startswith(RANDOM):
            self.gpu.drawn.append(name)
        if label is not CPU:
            inputs = {_storage_id(tensor) for tensor in tensors}
            new = [t for t in _tensors(result) if _storage_id(t) not in inputs]
            set_label(new, label)
        return result


def _refuse_mixed(name: str, tensors: list[Tensor], labels: list[object]) -> None:
    inputs = list(zip(tensors, labels, strict=True))
    if name in INDEXING:  # indices of the CPU into a tensor of the GPU are allowed
        inputs = [pair for place, pair in enumerate(inputs) if place == 0 or pair[1] is GPU]
    if any(label is CPU and (t.ndim or name in REFUSE_CPU_SCALARS) for t, label in inputs):
        shown = ", ".join(
            f"{'cuda' if label is GPU else 'cpu'}{list(t.shape)}" for t, label in inputs
        )
        raise RuntimeError(f"Expected all tensors to be on the same device ({name}: {shown})")


class _PythonCalls(TorchFunctionMode):
    """Labels where a call names a device, reports labels, and refuses what CUDA tensors refuse."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        label = None if first is None or isinstance(first, FakeTensor) else label_of(first)

        # Questions about the device
        if func == DEVICE and label is GPU:
            return GPU
        if func == IS_CUDA and label is not None:
            return label is GPU
        if func == IS_CPU and label is GPU:
            return False
        if func is Tensor.get_device and label is GPU:
            return 0

        # Moves and conversions
        if label in (CPU, GPU) and func in MOVES:
            return self._move(func, args[0], args[1:], dict(kwargs))
        if label is GPU and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.pin_memory:
            if label is GPU:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor'")
            return args[0].clone()

        # New tensors
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            return set_label(self.run(GPU, func, args, kwargs | {"device": CPU}), GPU)
        if label is GPU and func in NEW_ON_SAME_DEVICE:
            return set_label(self.run(GPU, func, args, kwargs), GPU)
        on_gpu = any(label_of(tensor) is GPU for tensor in _tensors(args, kwargs))
        return self.run(GPU if on_gpu else CPU, func, args, kwargs)

    def run(self, device: object, func: Any, args: Any, kwargs: Any) -> Any:
        """The call itself, whose operators without tensor inputs are on `device`."""
        self.gpu.python_calls.append(device)
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.python_calls.pop()

    def _move(self, func: Any, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`.to`, `.cuda`, `.cpu` or `.type_as`: a copy with another label, or a cast."""
        here, copy = label_of(tensor), bool(kwargs.pop("copy", False))
        other, memory_format = args[0] if args else kwargs.get("other"), None
        if isinstance(other, Tensor):
            there, dtype = label_of(other), other.dtype
        elif func is Tensor.to:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            if device is not None and device.type not in ("cuda", "cpu"):
                return func(tensor, *args, copy=copy, **kwargs)
            there = here if device is None else GPU if device.type == "cuda" else CPU
        else:
            there, dtype = GPU if func is Tensor.cuda else CPU, None
        moves = there is not here and there is not ANY
        options: dict[str, Any] = {"dtype": dtype or tensor.dtype, "copy": copy or moves}
        if memory_format is not None:
            options["memory_format"] = memory_format
        result = self.run(CPU, Tensor.to, (tensor,), options)
        return set_label(result, there) if moves else result


def _cuda_module() -> Iterator[Any]:
    """Answers of torch.cuda."""
    memory = 80 * 2**30
    properties = SimpleNamespace(name="fake GPU", total_memory=memory, major=9, minor=0)
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_initialized": False,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    without_effect = ("_lazy_init", "synchronize", "empty_cache", "set_device")
    without_effect += ("manual_seed", "manual_seed_all", "set_rng_state")
    for name, answer in (answers | dict.fromkeys(without_effect)).items():
        yield mock.patch.object(torch.cuda, name, lambda *a, answer=answer, **k: answer)


def _calls_from_cpp(calls: _PythonCalls) -> Iterator[Any]:
    """Where torch reads devices in C++, or runs Python (hooks, recomputed blocks) from the autograd
    engine with the function mode switched off."""
    group, backward = (
        clip_grad._group_tensors_by_device_and_dtype,
        torch.autograd._engine_run_backward,
    )

    def group_by_label(tensor_lists: Any, *options: Any) -> Any:
        groups = group(tensor_lists, *options)
        return {
            (GPU if label_of(lists[0][0][0]) is GPU else device, dtype): (lists, indices)
            for (device, dtype), (lists, indices) in groups.items()
        }

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with calls:
            return calls.run(ANY, backward, args, kwargs)

    def metadata(tensor: Tensor) -> dict[str, object]:
        return {"shape": tensor.shape, "dtype": tensor.dtype, "device": str(label_of(tensor))}

    yield mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", group_by_label)
    yield mock.patch.object(torch.autograd, "_engine_run_backward", run_backward)
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    default = torch.utils.checkpoint._DEFAULT_DETERMINISM_MODE
    yield mock.patch.dict(checks, {default: metadata})


@contextmanager
def _fresh_accelerate_state() -> Iterator[None]:
    """accelerate remembers the first device that it saw for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared_state = dict(PartialState._shared_state)

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    try:
        yield
    finally:
        forget()
        PartialState._shared_state.update(shared_state)
