"""SFNorMuon under FSDP2, with checkpoints of torch.distributed.checkpoint, from which any number of
processes goes on.

    PYTHONPATH=. torchrun --standalone --nproc_per_node=2 examples/fsdp2.py out/ 12

12 steps; the same command with a larger number goes on from the last checkpoint.
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

from sf_normuon import SFNorMuon, param_groups

out, steps = Path(sys.argv[1]), int(sys.argv[2])
cuda = torch.cuda.is_available()
if cuda:  # before anything goes onto a card. A node numbers its cards from 0, so not by rank
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = "cuda" if cuda else "cpu"  # "cuda" is this process's card
dist.init_process_group("nccl" if cuda else "gloo")
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32),
                      nn.Linear(32, 96)).to(device)
for layer in model:
    fully_shard(layer)
fully_shard(model)
# After fully_shard, which makes new parameters. The matrices of the first two Linears; the last
# one is known as the output head by its 96 outputs.
opt = SFNorMuon(param_groups(model), lr=0.02, warmup_steps=4)

step = 0
saved = sorted(path.parent for path in out.glob("*/.metadata"))  # which is written last
if saved:
    # makes the optimizer's state, in train mode
    model_state, opt_state = get_state_dict(model, opt)
    state = {"model": model_state, "optimizer": opt_state, "step": step}
    dcp.load(state, checkpoint_id=saved[-1])
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step = state["step"]

while step < steps:
    step += 1
    opt.train()
    x = torch.randint(96, (60,), generator=torch.Generator().manual_seed(step))
    x = x[rank::processes].to(device)
    loss = nn.functional.cross_entropy(model(x), (5 * x + 3) % 96)
    loss.backward()  # fully_shard averages over the processes
    opt.step()
    opt.zero_grad()
    if step % 6 == 0 or step == steps:
        opt.eval()  # so that the saved model is x; on every process
        model_state, opt_state = get_state_dict(model, opt)
        state = {"model": model_state, "optimizer": opt_state, "step": step}
        dcp.save(state, checkpoint_id=out / f"{step:06}")

print(f"process {rank} of {processes}: step {step}", flush=True)
os._exit(0)  # gloo's threads sometimes abort an ordinary exit
