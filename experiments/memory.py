"""Whether a run fits a card, found out without one: the model, its passes and a step of the optimizer are carried out on
tensors that have shapes but no memory.

    python experiments/memory.py configs/772m_sf.py --processes=8 --card=80
    python experiments/memory.py configs/772m_sf.py --processes=64 --n_layer=80 --n_head=64 --n_embd=8192 --batch_size=1
    torchrun --standalone --nproc_per_node=4 experiments/memory.py configs/125m_sf.py --measure     really, on the CPU

Counted for one process, without what an allocator wastes, for blocks that are not compiled and products in bfloat16.
Weights, gradients, state and the step's workspace are divided by the processes that share a copy of the model
(--shard_size, or all). The passes take the activations of batch_size sequences; where the model is shared, also the
embedding and two blocks with their gradients, which then exist whole, and where it is not, a copy of the weights in
bfloat16. Passes and step come one after the other, so the larger one counts.
"""
import argparse
import os
import sys
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.print_usage = lambda file: None  # what is asked wrongly gets one line
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--card", type=float, default=80.0, help="GB")
parser.add_argument("--measure", action="store_true")
options, knobs = parser.parse_known_args()
if options.processes < 1:
    print(f"memory.py: --processes must be at least 1, got {options.processes}", file=sys.stderr)
    sys.exit(2)
if not options.measure:
    os.environ["WORLD_SIZE"] = str(options.processes)  # which train.py reads: it refuses here what it would there

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import train
from model import GPT, GPTConfig


def build(cfg: train.Config, n_layer: int) -> GPT:
    model = GPT(GPTConfig(cfg.vocab_size or 50304, cfg.block_size, n_layer, cfg.n_head, cfg.n_embd))
    train.compile_and_checkpoint(cfg, model)
    return model


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(work, *owned) -> int:
    """Bytes that `work` needs at its peak, beyond what a model, its gradients and an optimizer take already."""
    tracker = MemTracker()
    tracker.track_external(*owned)
    before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    with tracker:
        work()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before


def activations(cfg: train.Config, n_layer: int) -> int:
    model, idx = build(cfg, n_layer), torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long)
    if train.WORLD_SIZE > 1:
        for p in model.hidden_matrices():  # as fully_shard gathers them
            p.data = p.data.bfloat16()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def work():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, idx)
        loss.backward()
    return peak(work, model)


def measure(cfg: train.Config) -> tuple[dict[str, float], int]:
    """Bytes on one process, by kind, and the number of parameters."""
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
        # In float32 the embedding and its gradient; of two blocks 2 bytes for weights, 4 for gradients on their way
        whole = 2 * size(model.wte.parameters()) + 3 * size(model.blocks[0].parameters()) if train.WORLD_SIZE > 1 else 0
    share = train.WORLD_SIZE // train.replicas(cfg)
    passes, step = two + (cfg.n_layer - 2) * (three - two) + whole, workspace / share
    n = weights // 4
    return {"weights": weights / share, "gradients": weights / share, "optimizer's state": state / share,
            "forward and backward" if passes > step else "step of the optimizer": max(passes, step)}, n


def measured(cfg: train.Config) -> str:
    """What weights, gradients and state really take in this process, from the memory it has before and after a step."""
    def now():
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    if train.WORLD_SIZE > 1:
        torch.distributed.init_process_group("gloo")
    before = now()
    model = train.build_model(cfg, 50304)
    optimizer = train.build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    n = sum(p.numel() for p in model.parameters())
    return f"process {train.RANK} of {train.WORLD_SIZE}: {(now() - before) / n:.2f} bytes per parameter, {n:,} parameters"


def main() -> None:
    try:
        cfg = train.parse([*knobs, "--device=cpu"])
    except train.Failure as e:
        print(f"memory.py: {e}", file=sys.stderr)
        sys.exit(e.status)
    cfg.compile = False
    if options.measure:
        print(measured(cfg))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads sometimes abort an ordinary exit
    parts, n = measure(cfg)
    for name, value in parts.items():
        print(f"{name:24}{value / 1e9:10.2f} GB{value / n:10.2f} bytes per parameter")
    total = sum(parts.values()) / 1e9
    print(f"{'all':24}{total:10.2f} GB: {'fits' if total < 0.95 * options.card else 'does not fit'} "
          f"a card of {options.card:g} GB (5% kept free)")


if __name__ == "__main__":
    main()
