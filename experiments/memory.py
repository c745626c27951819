"""Whether a run fits a card, without a card: the model, its passes and a step of the optimizer run
on tensors that have shapes but no memory.

    python experiments/memory.py configs/772m_sf.py --processes=8 --card=80
    python experiments/memory.py configs/772m_sf.py --processes=64 --n_layer=80 --n_embd=8000
    torchrun --standalone --nproc_per_node=4 experiments/memory.py configs/125m_sf.py --measure

The last one measures weights, gradients and state on CPUs. The count is for one process, without
what an allocator wastes, for blocks that are not compiled and products in bfloat16. Weights,
gradients, state and the step's workspace are divided by the processes that share a copy of the
model (--shard_size, or all). The passes take the activations of batch_size sequences. Where the
model is shared, they also take the embedding and two blocks with their gradients, which then
exist whole; where it is not, a copy of the weights in bfloat16. A checkpoint takes one whole
parameter. Passes, step and checkpoint come one after the other, so the largest counts. The start
takes nothing more: a process holds its share on the card, and one whole parameter on the host,
which the last line gives.
"""
import argparse
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.print_usage = lambda file: None  # a usage error gets one line
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--card", type=float, default=80.0, help="GB")
parser.add_argument("--measure", action="store_true")
options, knobs = parser.parse_known_args()
if options.processes < 1:
    print(f"memory.py: --processes must be at least 1, got {options.processes}", file=sys.stderr)
    sys.exit(2)
if not options.measure:
    os.environ["WORLD_SIZE"] = str(options.processes)  # train.py then refuses what it would

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train
from model import GPT, GPTConfig
from sf_normuon import param_groups


def build(cfg: train.Config, n_layer: int) -> GPT:
    vocab_size = cfg.vocab_size or 50304
    model = GPT(GPTConfig(vocab_size, cfg.block_size, n_layer, cfg.n_head, cfg.n_embd))
    train.compile_and_checkpoint(cfg, model)
    return model


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(work, *owned) -> int:
    """Bytes that `work` needs at its peak, beyond a model, its gradients and an optimizer."""
    tracker = MemTracker()
    tracker.track_external(*owned)
    before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    with tracker:
        work()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before


def activations(cfg: train.Config, n_layer: int) -> int:
    model = build(cfg, n_layer)
    idx = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
    if train.WORLD_SIZE > 1:
        for p in param_groups(model)[0]["params"]:  # as fully_shard gathers them
            p.data = p.data.bfloat16()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def work():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
    return peak(work, model)


def measure(cfg: train.Config) -> tuple[dict[str, float], int, int]:
    """Bytes on one card by kind, the number of parameters, the bytes of the largest one."""
    with FakeTensorMode():
        two, three = activations(cfg, 2), activations(cfg, 3)
        model = build(cfg, cfg.n_layer)
        optimizer = train.build_optimizer(cfg, model)
        weights = size(model.parameters())
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        state = size(t for s in optimizer.state.values() for t in s.values())
        workspace = peak(optimizer.step, model, optimizer)
        largest = max(size([p]) for p in model.parameters())
        # The embedding and its gradient in float32; two blocks, weights in 2 bytes, gradients in 4
        whole = 2 * size(model.wte.parameters()) + 3 * size(model.blocks[0].parameters())
    share = train.WORLD_SIZE // train.replicas(cfg)
    passes = two + (cfg.n_layer - 2) * (three - two) + whole * (train.WORLD_SIZE > 1)
    step = max(workspace / share, largest * (share > 1))
    parts = {"weights": weights / share, "gradients": weights / share,
             "optimizer's state": state / share,
             "forward and backward" if passes > step else "step or checkpoint": max(passes, step)}
    return parts, weights // 4, largest


def measured(cfg: train.Config) -> str:
    """What weights, gradients and state really take in this process: the start and a first step."""
    def now(field):
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith(field))

    if train.WORLD_SIZE > 1:
        torch.distributed.init_process_group("gloo")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, counts from here
    before, resident = now("RssAnon"), now("VmRSS")
    model = train.build_model(cfg, cfg.vocab_size or 50304)
    start = now("VmHWM") - resident
    optimizer = train.build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(lambda: 1.0)  # schedulefree_plus asks for the loss
    n = sum(p.numel() for p in model.parameters())
    held = (now("RssAnon") - before) / n
    return (f"process {train.RANK} of {train.WORLD_SIZE}: {held:.2f} bytes per parameter, "
            f"at most {start / n:.2f} while it started, {n:,} parameters")


def main() -> None:
    try:
        cfg = train.parse([*knobs, "--device=cpu"])
        cfg.compile = False
        if options.measure:
            print(measured(cfg), flush=True)
            os._exit(0)  # gloo's threads sometimes abort an ordinary exit
        if cfg.optimizer == "schedulefree_plus":
            raise train.Failure("schedulefree_plus reads its gradients' values, and nothing has "
                                "values here: count adamw, and 4 bytes per parameter more", 2)
        parts, n, largest = measure(cfg)
    except (train.Failure, ValueError) as e:  # ValueError: knobs that do not fit together
        print(f"memory.py: {e}", file=sys.stderr)
        sys.exit(2)
    for name, value in parts.items():
        print(f"{name:24}{value / 1e9:10.2f} GB{value / n:10.2f} bytes per parameter")
    total = sum(parts.values()) / 1e9
    verdict = "fits" if total < 0.95 * options.card else "does not fit"
    print(f"{'all':24}{total:10.2f} GB: {verdict} a card of {options.card:g} GB (5% kept free)")
    print(f"{'on the host, to start':24}{largest / 1e9:10.2f} GB")


if __name__ == "__main__":
    main()
