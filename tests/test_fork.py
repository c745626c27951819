"""An optimizer that is added as README tells: a class, an entry, a config, and nothing else."""
import json
import re
import shutil
import signal

import torch

from conftest import REPO
from test_experiments import run

CLASS = '''

class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, momentum):
        super().__init__(params, dict(lr=1e-3, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state.get(p):
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                M = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.sub_(M.sign(), alpha=group["lr"])


OPTIMIZERS["sign_sgd"] = Entry("SignSGD", True, lambda groups, cfg: SignSGD(groups, cfg.momentum))
'''
CONFIG = '''
optimizer, schedule, lr, momentum, warmup_steps = "sign_sgd", "linear", 0.003, 0.9, 10
n_layer, n_head, n_embd, block_size, batch_size, total_batch_tokens = 1, 1, 32, 32, 8, 256
data_dir, max_tokens, eval_interval, eval_tokens = "data/stdlib", 60 * 256, 30, 4096
checkpoint_interval, device, compile = 20, "cpu", False
'''
KILLED = '''
import os, runpy, signal, sys
import checkpoint

save = checkpoint.save
def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save = save_and_die
runpy.run_path("train.py", run_name="__main__")
'''


def test_an_added_optimizer_trains_resumes_compares_and_is_counted(tmp_path):
    for path in [*REPO.glob("*.py"), *REPO.glob("experiments/*.py")]:
        (tmp_path / path.relative_to(REPO)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(REPO))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/sign.py").write_text(CONFIG)
    model = tmp_path / "model.py"
    frozen = "        self.norm.weight.requires_grad = False\n"  # a fork may train a part only
    place = "        self.softmax_ ="
    model.write_text(model.read_text().replace(place, frozen + place))
    with open(tmp_path / "baselines.py", "a") as file:
        file.write(CLASS)
    run(tmp_path, "train.py", "configs/sign.py", "--out_dir=runs/whole")
    (tmp_path / "killed.py").write_text(KILLED)
    run(tmp_path, "killed.py", "configs/sign.py", status=-signal.SIGKILL)
    assert "going on from" in run(tmp_path, "train.py", "configs/sign.py").out
    whole, resumed = (torch.load(tmp_path / f"runs/{name}/ckpt.pt", weights_only=True)
                      for name in ("whole", "sign"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name])
    log = map(json.loads, (tmp_path / "runs/whole/log.jsonl").read_text().splitlines())
    first, last = [line["val_loss"] for line in log if "val_loss" in line]
    assert last < first < 5.77  # log(320), before it has learned
    assert "SignSGD" in run(tmp_path, "experiments/compare.py", "runs/whole", "runs/sign").out
    shutil.copy(REPO / "model.py", model)  # torch's MemTracker refuses frozen parameters
    counted = run(tmp_path, "experiments/memory.py", "configs/sign.py").out
    assert re.search(r"optimizer's state .* 4\.00 bytes per parameter", counted)
