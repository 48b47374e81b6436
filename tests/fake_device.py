"""A device that behaves like a GPU where a GPU breaks programs first, on a machine without one.

A tensor on it holds a CPU tensor, and each operation is computed there. As on a GPU,

- an operation that mixes its tensors with CPU tensors is an error (only CPU tensors without
  dimensions, which are numbers, are allowed);
- random numbers on it need a generator of the device, which here draws the CPU's numbers;
- the host has to wait until the device has computed what is asked: a number is read, tensors are
  copied to the CPU, or the shape of a result depends on the data. A copy to the device is not
  counted.

`Meter` lists the waits, with the line of the program that caused each, and the kernels: the
operations that a GPU would be sent. Speed, memory and rounding are not a GPU's.

Importing this module registers the device for the whole process, which has to happen before its
first backward pass. So tests/core/test_device.py does it in a process of its own. It needs torch
2.9 or newer.
"""

import contextlib
import sys
from typing import NamedTuple

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import ROOT

NAME = "fake"
# The host waits for these, for copies to the CPU, and for boolean indexing.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "bincount",
}
COPYING = {"_to_copy", "copy_"}
NO_KERNEL = {"detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty"}
# Autocast computes these in half precision. (A GPU's list is longer; the others are not used here.)
CAST = {"linear": 3, "matmul": 2, "scaled_dot_product_attention": 3}  # {name: how many tensors}


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of the module of a device."""

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")


# ---- tensors and operations ----


class FakeTensor(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor in it."""

    @staticmethod
    def __new__(cls, raw):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        wrapper.raw = raw
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Operation(function, args, kwargs or {}).compute()

    def __repr__(self):
        return f"FakeTensor({self.raw})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        """What a checkpoint holds is read on any device."""
        return self.raw.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, *, dtype=None, device=None):
        options = {"dtype": dtype or self.dtype, "device": device or self.device}
        return REPLACEMENTS["tensor"](data, **options)


class Operation:
    """A call of one of torch's operators."""

    def __init__(self, function: torch._ops.OpOverload, args: tuple, kwargs: dict):
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.name = function.overloadpacket.__name__
        everything = [*leaves(args), *leaves(list(kwargs.values()))]
        self.tensors = [x for x in everything if isinstance(x, torch.Tensor)]
        self.reads_device = any(map(is_fake, self.tensors))
        on_cpu = [x for x in self.tensors if not is_fake(x)]
        self.copies = self.name in COPYING
        # A number may come from the CPU, but a copy of it is a copy.
        self.reads_cpu = any(x.dim() > 0 or self.copies for x in on_cpu)
        self.writes_device = self.reads_device
        if "device" in kwargs and kwargs["device"] is not None:
            self.writes_device = torch.device(kwargs["device"]).type == NAME
        elif self.name == "copy_":
            self.writes_device = is_fake(args[0])
        elif self.name == "_local_scalar_dense":
            self.writes_device = False

    def compute(self):
        self.check()
        wrappers = {id(x.raw): x for x in self.tensors if is_fake(x)}
        args = replace(self.args, without_device)
        kwargs = {name: replace(x, without_device) for name, x in self.kwargs.items()}

        def on_its_device(x):
            if not isinstance(x, torch.Tensor) or not self.writes_device:
                return x
            # An operation in place returns its argument.
            return wrappers[id(x)] if id(x) in wrappers else FakeTensor(x)

        return replace(self.function(*args, **kwargs), on_its_device)

    def check(self) -> None:
        """Raise RuntimeError if the operation would fail on a GPU."""
        uses_device = self.reads_device or self.writes_device
        if uses_device and self.reads_cpu and not self.copies:
            raise RuntimeError(f"{self.function} mixes tensors of the {NAME} device and of the CPU")
        generator = self.kwargs.get("generator")
        if generator is not None and uses_device != (generator._cdata in GENERATORS):
            raise RuntimeError(f"{self.function} has a generator of another device")

    def waits(self) -> bool:
        """Whether the host waits until the device has computed this."""
        if self.copies:
            return self.reads_device and not self.writes_device  # to the CPU
        if self.name.startswith("index"):
            return any(x.dtype == torch.bool for x in leaves(self.args[1]) if is_fake(x))
        return self.name in WAITING and self.reads_device

    def is_kernel(self) -> bool:
        """Whether a GPU is sent work. Views and new memory are none."""
        results = [result.alias_info for result in self.function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in results)
        return self.writes_device and not is_view and self.name not in NO_KERNEL


def is_fake(x) -> bool:
    return isinstance(x, FakeTensor)


def leaves(x):
    """What is in lists and tuples, and in those in them."""
    if not isinstance(x, (list, tuple)):
        yield x
        return
    for part in x:
        yield from leaves(part)


def replace(x, function):
    """The same lists and tuples of function(leaf) for each leaf."""
    if isinstance(x, (list, tuple)):
        return type(x)([replace(part, function) for part in x])
    return function(x)


def without_device(x):
    if isinstance(x, torch.device) and x.type == NAME:
        return CPU
    return x.raw if is_fake(x) else x


# ---- what no dispatch sees: functions that make tensors of numbers, generators, autocast ----

TORCH = {name: getattr(torch, name) for name in ("Generator", "tensor", "as_tensor")}
GENERATORS = {}  # those of the device, by address; kept, so that no other one gets the address


class Generator:
    def __new__(cls, device="cpu"):
        generator = TORCH["Generator"]("cpu")
        if torch.device(device).type == NAME:
            GENERATORS[generator._cdata] = generator
        return generator


def through_the_cpu(name: str):
    """torch.tensor or torch.as_tensor, which copies to the device what it has made on the CPU."""

    def make(data, *, device=None, **options):
        if device is None or torch.device(device).type != NAME:
            return TORCH[name](data, device=device, **options)
        return TORCH[name](data, **options).to(device)

    return make


REPLACEMENTS = {
    "Generator": Generator,
    "tensor": through_the_cpu("tensor"),
    "as_tensor": through_the_cpu("as_tensor"),
}


def register_autocast(library: torch.library.Library, name: str, tensors: int) -> None:
    """Compute a function under autocast with its first arguments in half precision."""

    def in_half(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        cast = [x if x is None else x.to(dtype) for x in args[:tensors]]
        with torch.autocast(NAME, enabled=False):
            return getattr(torch.ops.aten, name)(*cast, *args[tensors:], **kwargs)

    library.impl(name, in_half, "AutocastPrivateUse1")


LIBRARY = torch.library.Library("aten", "IMPL")
for _name, _tensors in CAST.items():
    register_autocast(LIBRARY, _name, _tensors)
ALL_OTHERS = torch.library.Library("_", "IMPL")
ALL_OTHERS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


# ---- runs on the device ----


class Event(NamedTuple):
    """An operation that a GPU is sent, or that the host waits for."""

    name: str
    kernel: bool
    waits: bool
    # If the host waits: the program's functions that are running, innermost first, and its line.
    functions: tuple[str, ...] = ()
    line: str = ""


class Meter(TorchDispatchMode):
    """Inside, tensors can be made on the device, and its events are listed."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = Operation(function, args, kwargs or {})
        waits, kernel = operation.waits(), operation.is_kernel()
        if waits or kernel:
            place = running() if waits else ()
            self.events.append(Event(operation.name, kernel, waits, *place))
        return operation.compute()


def running() -> tuple[tuple[str, ...], str]:
    """The program's functions that are running, innermost first, and the line of the first."""
    frame = sys._getframe(2)
    names = []
    line = ""
    while frame:
        path = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        if path.startswith(("rlhf/", "data/", "docs/", "train_")):
            line = line or f"{path}:{frame.f_lineno}"
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return tuple(names), line


@contextlib.contextmanager
def on_the_device():
    """What runs inside takes the device whatever --device says. Yields a Meter."""
    with pytest.MonkeyPatch.context() as patch, Meter() as meter:
        for name, replacement in REPLACEMENTS.items():
            patch.setattr(torch, name, replacement)
        for name, module in list(sys.modules.items()):
            if name.startswith(("rlhf", "data", "docs")) and hasattr(module, "pick_device"):
                patch.setattr(module, "pick_device", lambda name: DEVICE)
        yield meter
