"""The compiler's work for a card that is not there: the parts of a training step that torch.compile
sees, of the 125M and 772M configs, on CUDA tensors that have shapes but no memory, with Triton's
kernels down to binaries for sm_90.

It needs a CUDA build of torch with its Triton, and gcc: no_card.c stands in for the CUDA runtime
and driver, since torch asks for the card's properties and streams even then. Matrix products and
attention are calls of libraries, and where the real compiler would launch the compiled code, the
traced graph runs on the tensors without memory.
"""
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LAYERS = 2  # of a model here: all blocks share their graphs, which is one thing to find out
NOT_THERE = Path(__file__).with_name("no_card.c")


# ---- in a process that believes in the card

def work(config):
    """Traces and compiles five steps and two evaluations; the counts, as a dict."""
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx, config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.weak import WeakTensorKeyDictionary

    import train
    from baselines import build_optimizer
    from config import parse
    from model import GPT, GPTConfig

    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    inductor.joint_graph_constant_folding = False  # it computes the constants, on the card
    inductor.use_static_triton_launcher = False  # so that the binaries stay in reach
    graphs, code, kernels, running = [], [], [], [False]
    compile_whole, compile_inner, precompile = (
        compile_fx.compile_fx, compile_fx.compile_fx_inner, CachingAutotuner.precompile)

    def inner(gm, inputs, **kwargs):
        traced = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))  # compiling changes gm
        compile_inner(gm, inputs, **kwargs)

        def run(arguments):
            running[0] = True
            result = traced(*arguments)
            running[0] = False
            return result
        run._boxed_call = True
        return run

    def whole(gm, inputs, **kwargs):
        graphs.append(gm)
        return compile_whole(gm, inputs, inner_compile=inner, **kwargs)

    def compile_only(autotuner, *args, **kwargs):
        precompile(autotuner, warm_cache_only=True)
        kernels.extend(result.kernel for result in autotuner.compile_results)

    compile_fx.compile_fx, CachingAutotuner.precompile = whole, compile_only
    GraphLowering.save_output_code = staticmethod(code.append)

    cfg = parse([config, f"--n_layer={LAYERS}", "--device=cuda"])
    words = 50304
    # numbers in the logits of a part of the batch
    large = min(cfg.batch_size * cfg.block_size, 4096) * words
    alive, most = WeakTensorKeyDictionary(), [0]

    class CountLogits(FakeTensorMode):
        """Finds the most tensors of that size at a time, outside compiled functions."""

        def dispatch(self, func, types, args=(), kwargs=None):
            result = super().dispatch(func, types, args, kwargs)
            if not running[0] and isinstance(result, torch.Tensor) and result.numel() >= large:
                alive[result] = True
                most[0] = max(most[0], len({t.untyped_storage()._cdata for t in alive.keys()}))
            return result

    counts = []
    with CountLogits():
        with torch.device("cuda"):
            model = GPT(GPTConfig(words, cfg.block_size, LAYERS, cfg.n_head, cfg.n_embd))
        train.compile_and_checkpoint(cfg, model)
        optimizer = build_optimizer(cfg, model)
        idx = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.long, device="cuda")

        def step(without=()):
            with train.autocast(cfg):
                loss = model(idx, idx)
            loss.backward()
            for p in without:
                p.grad = None
            optimizer.step()
            model.zero_grad()

        def evaluation():
            optimizer.eval()
            with torch.no_grad(), train.autocast(cfg):
                model(idx, idx)
            optimizer.train()

        def fewer_matrices():  # as of experts that had no token
            step([model.blocks[0].attn.q.weight])

        for part in (step, step, step, evaluation, step, fewer_matrices, evaluation):
            part()
            counts.append(len(graphs))
        weights = sum(p.numel() for p in model.parameters())
    allocated = [eval(shape) for text in code
                 for shape in re.findall(r"empty_strided_cuda\((\([\d, ]*\))", text)]
    return dict(
        card=torch.cuda.get_device_name(), weights=weights, graphs=counts,
        breaks=sum(counters["graph_break"].values()),
        kernels=len(kernels),
        targets=sorted({str(kernel.metadata.target.arch) for kernel in kernels}),
        machines=sorted({int.from_bytes(kernel.asm["cubin"][18:20], "little")  # in the ELF header
                         for kernel in kernels}),
        logits=most[0], large=[shape for shape in allocated if math.prod(shape) >= large],
        attention=sorted({name for text in code
                          for name in re.findall(r"_scaled_dot_product_\w+", text)}))


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # the card's streams cannot be taken down

# ---------------------------------------------------------------- the tests

import pytest
import torch

from conftest import ENV, REPO

pytestmark = [pytest.mark.skipif(
    not torch.version.cuda or torch.cuda.is_available() or not shutil.which("gcc"),
    reason="needs a CUDA build of torch on a machine without a card, and gcc")]


@pytest.fixture(scope="session")
def not_there(tmp_path_factory):
    """The environment in which torch finds the card."""
    folder = tmp_path_factory.mktemp("no_card")
    packages = Path(torch.__file__).parents[1]  # torch's own headers, and what they include
    headers = [*packages.glob("nvidia/cu*/include"), packages / "triton/backends/nvidia/include"]
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", *(f"-I{at}" for at in headers), str(NOT_THERE),
                    "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")], check=True)
    return {**ENV, "LD_PRELOAD": str(folder / "libcuda.so.1"), "LD_LIBRARY_PATH": str(folder),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton")}


@pytest.mark.parametrize("size,weights", [
    ("125m", 50304 * 768 + LAYERS * (12 * 768**2 + 2 * 768) + 768),
    ("772m", 50304 * 1280 + LAYERS * (12 * 1280**2 + 2 * 1280) + 1280)])
def test_what_is_compiled_for_a_card(not_there, size, weights):
    result = subprocess.run([sys.executable, __file__, str(REPO / f"configs/{size}_sf.py")],
                            env=not_there, text=True, capture_output=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["weights"] == weights and "H100" in found["card"]
    assert found["breaks"] == 0
    # block, loss, 3 shapes of Newton-Schulz; block without gradients
    assert found["graphs"] == [5, 5, 5, 6, 6, 6, 6]
    assert (found["kernels"] > 20 and found["targets"] == ["90"]
            and found["machines"] == [190])  # EM_CUDA
    assert found["logits"] == 1 and not found["large"]
    assert any("flash" in name or "cudnn" in name for name in found["attention"])
