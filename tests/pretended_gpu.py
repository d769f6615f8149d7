"""A pretended GPU: what the package does on a machine with CUDA or MPS, seen on a machine that has neither.

The numbers are real and computed on the CPU. Every storage carries the label of the device that it would be on, and that is what
`tensor.device` answers. So these faults show: tensors of two devices in one operation, a NumPy array asked of a GPU's tensor, a random
generator of the wrong device, float64 on MPS, something left on a device that should be empty, more bytes than the device has (which
is `torch.OutOfMemoryError`, with what is held then), and how often Python waits for the device or copies to and from it. A copy that is not
waited for (`non_blocking`) counts as under way until an event, a stream or the device behind it was waited for; until then it is an error to
read what it brings on the CPU, to use it on another stream that does not wait for it, or to write into what it takes.

What it cannot show: whether a kernel exists for an operation and what it computes; what else is asynchronous (every call is done when it
returns, and only copies are under way); the caching allocator's rounding and fragmentation (what is reserved here is the most that was in use
since the cache was last emptied); the workspaces of cuBLAS and cuDNN; speed.

    with pretended("cuda", count=2, total=8 << 30) as gpu:      # in a test
        model.to("cuda:1"); gpu.used("cuda:1")
    python -m pytest -m device --pretend cuda:2                 # a whole run, by conftest.py
"""
import contextlib, itertools, threading, types, weakref
from collections.abc import Iterator
from typing import Any

import pytest, torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
GPUS = ("cuda", "mps")
BLOCK = 512  # bytes: CUDA's allocator gives out no less
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::index_put",
            "aten::_index_put_impl_", "aten::set_",
            "aten::_local_scalar_dense", "aten::is_same_size",
            "aten::_has_compatible_shallow_copy_type"}  # operations that may meet two devices
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
           "aten::is_nonzero"}  # operations whose result Python needs at once


class PretendedGPU:
    "The devices: what lies on each, and how many bytes that are."

    def __init__(self, kind: str, count: int, total: int, others: int, capability: tuple[int, int]):
        self.kind, self.total, self.others, self.capability = kind, total, others, capability
        self.devices = [torch.device(kind, index) for index in range(count)]
        self.synchronisations = 0
        self.copied = {"to": 0, "from": 0}  # bytes
        self.copies = {"to": 0, "from": 0}
        self.pinned: set[int] = set()  # storages
        self.coming: dict[int, int] = {}  # storage: number of the copy that fills it
        self.going: dict[int, int] = {}  # storage: number of the copy that reads it
        self.done: set[int] = set()  # numbers of copies that were waited for
        self._numbers = itertools.count()
        self.Stream, self.Event = stream_types(self)
        self._defaults = {device: self.Stream(device) for device in self.devices}
        self._threads = threading.local()  # streams that were made current
        self._labels: dict[int, tuple[torch.device, int]] = {}  # storage: its device, its bytes
        self._used = dict.fromkeys(self.devices, 0)
        self._peak = dict.fromkeys(self.devices, 0)
        self._reserved = dict.fromkeys(self.devices, 0)
        self._limit = dict.fromkeys(self.devices, total - others)

    @property
    def current(self) -> int:  # index
        "CUDA's current device, of which each thread has its own."
        return getattr(self._threads, "current", 0)

    @current.setter
    def current(self, index: int) -> None: self._threads.current = index

    def device(self, asked: Any = None) -> torch.device:  # with its number
        "What a device is called in full."
        if asked is None or isinstance(asked, int):
            return self.devices[self.current if asked is None or asked < 0 else asked]
        device = torch.device(asked)
        if device.type == "cpu": return CPU
        if device.type in GPUS and device.index is None:
            return torch.device(device.type, self.current if device.type == "cuda" else 0)
        return device

    def used(self, device: Any = None) -> int: return self._used[self.device(device)]
    def peak(self, device: Any = None) -> int: return self._peak[self.device(device)]
    def reserved(self, device: Any = None) -> int: return self._reserved[self.device(device)]
    def free(self, device: Any = None) -> int: return self.total - self.others - self.reserved(device)
    def set_limit(self, size: int, device: Any = None) -> None: self._limit[self.device(device)] = size
    def reset_peak(self, device: Any = None) -> None: self._peak[self.device(device)] = self.used(device)
    def empty_cache(self) -> None: self._reserved = dict(self._used)
    def synchronise(self, *_: Any) -> None: self.wait_for({*self.coming.values(), *self.going.values()})

    def wait_for(self, copies: set[int]) -> None:
        "Python waits until copies are done."
        self.synchronisations += 1
        self.done |= copies

    def stream(self, device: Any = None) -> Any:
        "The stream that is current in this thread."
        device = self.device(device)
        return getattr(self._threads, "streams", {}).get(device, self._defaults[device])

    @contextlib.contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        "`torch.cuda.stream`: within it, a stream and its device are current."
        if stream is None:
            yield
            return
        before, streams = self.current, getattr(self._threads, "streams", {})
        self.current, self._threads.streams = stream.device.index, streams | {stream.device: stream}
        try: yield
        finally: self.current, self._threads.streams = before, streams

    def moved(self, source: torch.Tensor, target: torch.Tensor, there: torch.device, non_blocking: bool) -> None:
        "Count a copy between the CPU and a device, and keep in mind whether it is still under way."
        here = self.of(source)
        way = "from" if there == CPU else "to"
        self.copies[way] += 1
        self.copied[way] += source.nbytes
        with torch._C.DisableTorchFunction(): taken, filled = source.untyped_storage(), target.untyped_storage()
        stream = self.stream(here if there == CPU else there)
        host = filled if there == CPU else taken
        free = non_blocking and (host._cdata in self.pinned or (self.kind == "mps" and there != CPU))
        if not free: return self.wait_for(set(stream.before))
        number = next(self._numbers)
        stream.before.add(number)
        self.coming[filled._cdata], self.going[taken._cdata] = number, number
        for storage in (filled, taken): weakref.finalize(storage, self._forget, storage._cdata)

    def check_order(self, tensor: torch.Tensor, writes: bool) -> None:
        "Refuse what comes before the copy that it depends on."
        with torch._C.DisableTorchFunction():
            if tensor.is_meta: return
            storage = tensor.untyped_storage()._cdata
        coming, going, place = self.coming.get(storage), self.going.get(storage), self.of(tensor)
        known = self.done if place == CPU else self.done | self.stream(place).before
        if coming is not None and coming not in known:
            raise RuntimeError(f"a tensor on {place} is used before the copy that fills it is done: nothing has waited for it")
        if writes and going is not None and going not in known:
            raise RuntimeError(f"a tensor on {place} is changed while it is copied from")

    def of(self, tensor: torch.Tensor) -> torch.device:
        "The device that a tensor would be on."
        with torch._C.DisableTorchFunction():
            if tensor.is_meta: return torch.device("meta")
            try: return self._labels.get(tensor.untyped_storage()._cdata, (CPU, 0))[0]
            except (RuntimeError, NotImplementedError): return CPU  # sparse and other tensors without a storage

    def _forget(self, storage: int) -> None:
        device, size = self._labels.pop(storage, (CPU, 0))
        self.pinned.discard(storage)
        for copies in (self.coming, self.going): copies.pop(storage, None)
        if device != CPU: self._used[device] -= size

    def put(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:  # the same
        "Let a tensor lie on a device."
        if device.type not in GPUS: return tensor
        with torch._C.DisableTorchFunction():
            if tensor.is_meta: return tensor
            storage = tensor.untyped_storage()
        if self._labels.get(storage._cdata, (CPU, 0))[0] == device: return tensor
        self._forget(storage._cdata)
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        used = self._used[device] + size
        if used > self._limit[device]:
            name = "CUDA" if device.type == "cuda" else "MPS backend"
            raise torch.OutOfMemoryError(f"{name} out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {device.index} has a total capacity of "
                                         f"{self._limit[device] / 2**20:.2f} MiB")
        self._used[device] = used
        self._peak[device] = max(self._peak[device], used)
        self._reserved[device] = max(self._reserved[device], used)
        self._labels[storage._cdata] = device, size
        weakref.finalize(storage, self._forget, storage._cdata)
        return tensor

    def copy(self, tensor: torch.Tensor, *arguments: Any, copy: bool = False, **options: Any) -> torch.Tensor:
        "`Tensor.to`, from any device to any other."
        if isinstance(options.get("device"), int): options["device"] = self.device(options["device"])
        if arguments and isinstance(arguments[0], int) and not isinstance(arguments[0], bool):
            arguments = self.device(arguments[0]), *arguments[1:]
        like = options.pop("other", arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None)
        asked, dtype, non_blocking, layout = (self.of(like), like.dtype, False,
                                              None) if like is not None else torch._C._nn._parse_to(*arguments,
                                                                                                    **options)
        here = self.of(tensor)
        there = here if asked is None else self.device(asked)
        dtype = dtype or tensor.dtype
        form = {} if layout is None else {"memory_format": layout}
        if here == there: return torch.Tensor.to(tensor, dtype=dtype, copy=copy, **form)
        if there.type == "mps" and dtype == torch.float64: raise TypeError(NO_FLOAT64)
        if "meta" in (here.type, there.type):
            moved = torch.Tensor.to(tensor, dtype=dtype, device="meta" if there.type == "meta" else CPU, **form)
            return self.put(moved, there)
        self.check_order(tensor, writes=False)
        with torch._C._DisableTorchDispatch():
            moved = torch.Tensor.to(tensor, dtype=dtype, copy=True, **form)  # without the label of what it comes from
        if there == CPU and non_blocking and here.type == "cuda": self.pin(moved)
        self.put(moved, there)
        if CPU in (here, there): self.moved(tensor, moved, there, non_blocking)
        return moved

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:  # the same
        "Let a tensor lie where the device can fetch it while Python goes on."
        with torch._C.DisableTorchFunction(): storage = tensor.untyped_storage()
        self.pinned.add(storage._cdata)
        weakref.finalize(storage, self._forget, storage._cdata)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction(): return tensor.untyped_storage()._cdata in self.pinned


class Operations(TorchDispatchMode):
    "What reaches an operation: results lie where the operands lie, and operands lie together."

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        name = operation._schema.name if hasattr(operation, "_schema") else str(operation)
        overload = f"{name}.{getattr(operation, '_overloadname', '')}"
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        places = [gpu.of(operand) for operand in operands]
        device = next((place for place in places if place.type in GPUS), CPU)
        bound = {place for operand, place in zip(operands, places) if place.type in GPUS
                 or (place == CPU and operand.dim())}  # a number on the CPU goes anywhere
        if len(bound) > 1 and not {name, overload} & CROSSING:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(sorted(map(str, bound)))}! "
                               f"(when checking {name})")
        if device.type in GPUS and name in WAITING: gpu.wait_for(set(gpu.stream(device).before))
        if gpu.coming or gpu.going:
            for operand in operands:
                gpu.check_order(operand, writes=operand is operands[0] and is_written(operation, kwargs))
            if "out" in kwargs: gpu.check_order(kwargs["out"], writes=True)
        if name == "aten::copy_" and len(set(places[:2])) == 2 and CPU in places[:2]:
            gpu.moved(operands[1], operands[0], places[0], bool((*args, *[False] * 3)[2]))
        if kwargs.get("device") is not None:
            device = gpu.device(kwargs["device"])
            if device.type in GPUS: kwargs["device"] = CPU
        check_generator(kwargs.get("generator"), device)
        if device.type == "mps" and (kwargs.get("dtype") == torch.float64
                                     or any(operand.dtype == torch.float64 for operand,
                                            place in zip(operands, places) if place == device)):
            raise TypeError(NO_FLOAT64)
        result = operation(*args, **kwargs)
        if device.type in GPUS:
            known = {operand.untyped_storage()._cdata for operand in operands if not operand.is_meta}
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor) and not value.is_meta and value.untyped_storage()._cdata not in known:
                    gpu.put(value, device)
        return result


def is_written(operation: Any, options: dict) -> bool:
    "Whether an operation changes its first operand; with `out` it changes that."
    schema = getattr(operation, "_schema", None)
    return schema is not None and schema.is_mutable and "out" not in options


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    "Refuse a random generator of another device, as PyTorch does."
    if generator is not None and device.type in GPUS and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found 'cpu'")


class Calls(TorchFunctionMode):
    "What Python asks of tensors: where they are, and to go elsewhere."

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu
        Tensor = torch.Tensor
        self.answers = {
            Tensor.device.__get__: gpu.of,
            Tensor.is_cuda.__get__: lambda tensor: gpu.of(tensor).type == "cuda",
            Tensor.is_mps.__get__: lambda tensor: gpu.of(tensor).type == "mps",
            Tensor.is_cpu.__get__: lambda tensor: gpu.of(tensor).type == "cpu",
            Tensor.get_device: lambda tensor: gpu.of(tensor).index if gpu.of(tensor).type in GPUS else -1,
            Tensor.to: gpu.copy,
            Tensor.cuda: lambda tensor, device=None, non_blocking=False,
            **_: gpu.copy(tensor, gpu.device(device), non_blocking=non_blocking),
            Tensor.cpu: lambda tensor, *_, **__: gpu.copy(tensor, CPU),
            Tensor.pin_memory: lambda tensor, *_: gpu.pin(tensor.clone()),
            Tensor.is_pinned: lambda tensor, *_: gpu.is_pinned(tensor)}

    def __torch_function__(self, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        if function in self.answers: return self.answers[function](*args, **kwargs)
        if function is torch.device:
            return gpu.device(args[0]) if args and isinstance(args[0], int) else function(*args, **kwargs)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__) and gpu.of(args[0]).type in GPUS:
            raise TypeError(f"can't convert {gpu.of(args[0])} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if function is torch.Tensor.__deepcopy__: return gpu.put(function(*args, **kwargs), gpu.of(args[0]))
        if function in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist):
            gpu.check_order(args[0], writes=False)
        if function is not torch.Tensor.pin_memory and kwargs.pop("pin_memory", False):
            return gpu.pin(function(*args, **kwargs))
        asked = kwargs.get("device")
        if function is torch._C._nn._parse_to or asked is None or gpu.device(asked).type not in GPUS:
            return function(*args, **kwargs)
        device = gpu.device(kwargs.pop("device"))
        check_generator(kwargs.get("generator"), device)
        if device.type == "mps" and kwargs.get("dtype") == torch.float64: raise TypeError(NO_FLOAT64)
        if function is torch.as_tensor and args and isinstance(args[0], torch.Tensor):
            return gpu.copy(args[0], device, **kwargs)
        result = function(*args, device="cpu", **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor): gpu.put(value, device)
        return result


def stream_types(gpu: PretendedGPU) -> tuple[type, type]:
    "`torch.cuda.Stream` and `torch.cuda.Event` of the pretended GPUs: each knows the copies that are done before what comes next."
    class Stream:
        def __init__(self, device: Any = None, *_: Any, **__: Any): self.device, self.before = gpu.device(device), set()
        def wait_event(self, event: Any) -> None: self.before |= event.before
        def wait_stream(self, other: Any) -> None: self.before |= other.before
        def synchronize(self) -> None: gpu.wait_for(set(self.before))
        def query(self) -> bool: return self.before <= gpu.done
        def record_event(self, event: Any = None) -> Any:
            event = event or Event()
            event.record(self)
            return event

    class Event:
        def __init__(self, *_: Any, **__: Any): self.before: set[int] = set()
        def record(self, stream: Any = None) -> None: self.before = set((stream or gpu.stream()).before)
        def wait(self, stream: Any = None) -> None: (stream or gpu.stream()).wait_event(self)
        def synchronize(self) -> None: gpu.wait_for(set(self.before))
        def query(self) -> bool: return self.before <= gpu.done
        def elapsed_time(self, *_: Any) -> float: return 0.
    return Stream, Event


def current_device(gpu: PretendedGPU) -> type:
    "`torch.cuda.device` of the pretended GPUs."
    class device:
        def __init__(self, asked: Any): self.index = asked if isinstance(asked, int) else gpu.device(asked).index
        def __enter__(self) -> None:
            self.before = gpu.current
            if self.index is not None and self.index >= 0: gpu.current = self.index
        def __exit__(self, *_: Any) -> None: gpu.current = self.before
    return device


def cuda_functions(gpu: PretendedGPU) -> dict[str, Any]:
    "What `torch.cuda` answers."
    properties = types.SimpleNamespace(name="Pretended", total_memory=gpu.total, major=gpu.capability[0],
                                       minor=gpu.capability[1], multi_processor_count=108)
    def set_fraction(share: float,
                     device: Any = None) -> None: gpu.set_limit(min(int(share * gpu.total), gpu.total - gpu.others),
                                                                device)
    def set_device(device: Any) -> None: gpu.current = gpu.device(device).index
    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: len(gpu.devices), "current_device": lambda: gpu.current, "set_device": set_device,
        "device": current_device(gpu),
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties, "is_bf16_supported": lambda *_,
        **__: gpu.capability >= (8, 0),
        "get_arch_list": lambda: ["sm_%d%d" % gpu.capability],
        "mem_get_info": lambda device=None: (gpu.free(device), gpu.total), "memory_allocated": gpu.used,
        "max_memory_allocated": gpu.peak,
        "memory_reserved": gpu.reserved,
        "max_memory_reserved": lambda device=None: max(gpu.reserved(device), gpu.peak(device)),
        "reset_peak_memory_stats": gpu.reset_peak, "empty_cache": gpu.empty_cache, "ipc_collect": lambda: None,
        "set_per_process_memory_fraction": set_fraction,
        "synchronize": gpu.synchronise, "Stream": gpu.Stream, "Event": gpu.Event, "current_stream": gpu.stream,
        "default_stream": lambda device=None: gpu._defaults[gpu.device(device)], "stream": gpu.on_stream}


def mps_functions(gpu: PretendedGPU) -> dict[str, Any]:
    "What `torch.mps` answers."
    return {"is_available": lambda: True, "device_count": lambda: 1, "recommended_max_memory": lambda: gpu.total,
            "empty_cache": gpu.empty_cache,
            "driver_allocated_memory": lambda: gpu.reserved() + gpu.others, "current_allocated_memory": gpu.used,
            "synchronize": gpu.synchronise}


def accelerator_functions(gpu: PretendedGPU) -> dict[str, Any]:
    "What `torch.accelerator` answers."
    return {"is_available": lambda: True, "device_count": lambda: len(gpu.devices),
            "current_device_index": lambda: gpu.current,
            "current_accelerator": lambda check_available=False: torch.device(gpu.kind), "memory_allocated": gpu.used,
            "empty_cache": gpu.empty_cache,
            "synchronize": gpu.synchronise}


@contextlib.contextmanager
def pretended(kind: str = "cuda",  # or "mps"
              count: int = 1,  # devices
              total: int = 24 << 30,  # bytes of each
              others: int = 0,  # bytes of each that other programs hold
              capability: tuple[int, int] = (8, 0),  # CUDA's, of the generation
              ) -> Iterator[PretendedGPU]:
    "Within it this machine has GPUs, in every thread that is started there."
    import bitsandbytes  # noqa: F401 - before torch says that there is CUDA: its kernels for that are not here
    gpu = PretendedGPU(kind, count, total, others, capability)
    run = threading.Thread.run
    def run_on_it(thread: threading.Thread) -> None:
        with Calls(gpu), Operations(gpu): run(thread)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "cuda":
            for name, value in cuda_functions(gpu).items(): patch.setattr(torch.cuda, name, value)
            patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
            patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        else:
            for name, value in mps_functions(gpu).items(): patch.setattr(torch.mps, name, value)
            patch.setattr(torch.backends.mps, "is_available", lambda: True)
            patch.setattr(torch.backends.mps, "is_built", lambda: True)
        for name, value in accelerator_functions(gpu).items():
            patch.setattr(torch.accelerator, name, value, raising=False)
        patch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device(kind))
        patch.setattr(threading.Thread, "run", run_on_it)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # transformers' loading threads are older than this
        with Calls(gpu), Operations(gpu): yield gpu


def pretend(text: str) -> contextlib.AbstractContextManager[PretendedGPU]:  # "cuda", "cuda:2", "mps"
    "The machine that an option of the command line names."
    kind, _, count = text.partition(":")
    return pretended(kind, int(count or 1))
