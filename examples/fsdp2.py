"""SFNorMuon under FSDP2, with checkpoints of torch.distributed.checkpoint, from which any number of processes goes on.

    PYTHONPATH=. torchrun --standalone --nproc_per_node=2 examples/fsdp2.py out/ 12     12 steps; goes on from the last checkpoint
"""
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sf_normuon import SFNorMuon

out, steps = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
for layer in model:
    fully_shard(layer)
fully_shard(model)
matrices = [model[0].weight, model[2].weight]  # after fully_shard, which makes new parameters
others = [model[0].bias, model[2].bias, *model[4].parameters()]
opt = SFNorMuon([{"params": matrices}, {"params": others, "use_muon": False}], lr=0.02, warmup_steps=4)

step = 0
saved = sorted(path.parent for path in out.glob("*/.metadata"))  # which is written last
if saved:
    model_state, opt_state = get_state_dict(model, opt)  # makes the optimizer's state, in train mode
    state = {"model": model_state, "optimizer": opt_state, "step": step}
    dcp.load(state, checkpoint_id=saved[-1])
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step = state["step"]

while step < steps:
    step += 1
    opt.train()
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(step))[rank::processes].to(device)
    loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
    loss.backward()  # fully_shard averages over the processes
    opt.step()
    opt.zero_grad()
    if step % 6 == 0 or step == steps:
        opt.eval()  # so that the saved model is x; on every process
        model_state, opt_state = get_state_dict(model, opt)
        dcp.save({"model": model_state, "optimizer": opt_state, "step": step}, checkpoint_id=out / f"{step:06}")

print(f"process {rank} of {processes}: step {step}", flush=True)
os._exit(0)  # gloo's threads sometimes abort an ordinary exit
