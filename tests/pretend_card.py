"""Runs a program as on a machine with NVIDIA cards, on one without: tensors, autocast, generators,
meshes and NCCL that it asks for on "cuda" are the CPU's and gloo's, while torch's own Python checks
of device arguments stay in force.

    python tests/pretend_card.py [--cards=2] train.py configs/quickstart.py
    torchrun --standalone --nproc_per_node=2 tests/pretend_card.py --cards=2 \
        train.py configs/quickstart.py

Every Python process that the program starts pretends too. With PRETEND_LOG set to a folder, each
process leaves a file <its pid> there, with a line "<LOCAL_RANK> <number of the card>" for each card
that it put a tensor or a communicator on.
"""
import contextlib
import importlib.abc
import importlib.util
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

MEMORY = 85_000_000_000  # bytes of an H100
STREAM = SimpleNamespace(synchronize=lambda: None, is_capturing=lambda: False, device_type="cuda")


class AfterTorch(importlib.abc.MetaPathFinder):
    """Changes torch as soon as it has been imported; processes that do without it do not pay for
    it."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        load = spec.loader.exec_module

        def load_and_pretend(module):
            load(module)
            pretend(module)
        spec.loader.exec_module = load_and_pretend
        return spec


def pretend(torch):
    import torch.distributed.device_mesh as device_mesh
    from torch.overrides import TorchFunctionMode

    cuda, dist = torch.cuda, torch.distributed
    numbers = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[
        :int(os.environ["PRETEND_CARDS"])]
    now, taken = [0], set()  # the current card; those that were used

    def check(index):
        if index is not None and not 0 <= index < len(numbers):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")

    def take(index=None):
        check(index)
        number = numbers[now[0] if index is None else index]
        if number not in taken and "PRETEND_LOG" in os.environ:
            with open(Path(os.environ["PRETEND_LOG"]) / str(os.getpid()), "a") as file:
                file.write(f"{os.environ.get('LOCAL_RANK', 0)} {number}\n")
        taken.add(number)

    def on_cpu(value):
        """The CPU where a card is meant, which is then taken."""
        if isinstance(value, torch.device) and value.type == "cuda" or \
                isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value):
            take(torch.device(value).index)
            return "cpu"
        return value

    class OnCPU(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.device:
                return func(*args, **kwargs)
            if func is torch.Tensor.pin_memory:
                return args[0]
            if (func is torch.Tensor.cuda
                    or func is torch.Tensor.to and type(args[1:2] and args[1]) is int):
                take(*args[1:2])
                return args[0]
            return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})

    def set_device(index):
        check(index)
        now[0] = index

    class Event:
        def __init__(self, **kwargs):
            pass

        def record(self, stream=None):
            self.time = time.perf_counter()

        def elapsed_time(self, end):  # ms
            return 1e3 * (end.time - self.time)

    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=MEMORY, major=9,
                                 minor=0, multi_processor_count=132, uuid="GPU-0")

    def get_device_properties(device=None):
        check(cuda._utils._get_device_index(device, optional=True))
        return properties

    def used(device=None):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch._C._cuda_setDevice = set_device  # behind torch.cuda.set_device and its checks
    for name, value in dict(
            is_available=lambda: bool(numbers), device_count=lambda: len(numbers),
            current_device=lambda: now[0], _lazy_init=lambda: None,
            get_device_properties=get_device_properties, memory_allocated=used,
            max_memory_allocated=used, memory_reserved=used, max_memory_reserved=used, Event=Event,
            mem_get_info=lambda device=None: (MEMORY - used(), MEMORY),
            memory_stats=lambda device=None: {},
            is_bf16_supported=lambda including_emulation=True: True,
            synchronize=lambda device=None: None,
            empty_cache=lambda: None, reset_peak_memory_stats=lambda device=None: None,
            is_current_stream_capturing=lambda: False, current_stream=lambda device=None: STREAM,
            stream=lambda stream: contextlib.nullcontext()).items():
        setattr(cuda, name, value)
    torch.accelerator.current_stream = cuda.current_stream
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
        module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])

    class Generator(torch.Generator):  # which takes the number of a card that is not there
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu" if "cuda" in str(device) else device)

    torch.Generator = Generator
    begin = torch.autocast.__init__
    torch.autocast.__init__ = lambda self, device_type, *args, **kwargs: begin(
        self, on_cpu(device_type), *args, **kwargs)

    init, mesh = dist.init_process_group, device_mesh.init_device_mesh

    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        if "nccl" in (backend or "nccl"):
            take()  # NCCL's communicator is made on the current card
            backend = "gloo"
        return init(backend, *args, **kwargs)

    def init_device_mesh(device_type, *args, **kwargs):
        return mesh(on_cpu(device_type), *args, **kwargs)

    dist.init_process_group = init_process_group
    dist.init_device_mesh = device_mesh.init_device_mesh = init_device_mesh
    OnCPU().__enter__()


if __name__ == "sitecustomize":  # which Python imports at its start
    sys.meta_path.insert(0, AfterTorch())
elif __name__ == "__main__":
    cards = re.fullmatch(r"--cards=(\d+)", sys.argv[1])
    folder = Path(tempfile.gettempdir()) / f"pretend_card_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    link = folder / f"{os.getpid()}.tmp"
    link.symlink_to(Path(__file__).resolve())
    link.replace(folder / "sitecustomize.py")
    os.environ["PRETEND_CARDS"] = cards[1] if cards else "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, *sys.argv[2 if cards else 1:]])
