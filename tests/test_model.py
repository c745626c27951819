"""What must stay true of model.py."""
import shutil
import types

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train
from conftest import REPO, SMALL
from model import GPT, GPTConfig
from sf_normuon import SFNorMuon, param_groups


def test_model_is_arcee(small):
    """An independent implementation with the same weights gives the same logits."""
    transformers = pytest.importorskip("transformers")
    c = SMALL
    hf = transformers.ArceeForCausalLM(transformers.ArceeConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
        hidden_act="relu2", max_position_embeddings=c.block_size, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)).eval()
    names = {"wte.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(c.n_layer):
        for ours, theirs in {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
                             "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
                             **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}}.items():
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    state = {names[k]: v for k, v in small.state_dict().items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    hf.tie_weights()
    idx = torch.randint(0, c.vocab_size, (2, c.block_size))
    with torch.no_grad():
        assert (small(idx) - hf(idx).logits).abs().max() < 1e-5


def test_loss(small, monkeypatch):
    """The mean over targets that are not -1, the same in chunks as in one piece, with the same
    gradients."""
    idx, targets = torch.randint(0, 96, (2, 3, 48)).unbind()
    targets[1, 7:] = -1
    expected = F.cross_entropy(small(idx).double().flatten(0, 1), targets.flatten(),
                               ignore_index=-1)
    grads = torch.autograd.grad(expected, list(small.parameters()))
    for chunk, cached in ((4096, 2**20), (4096, 7 * 96), (50, 7 * 96), (1, 1)):
        monkeypatch.setattr(model_module, "CHUNK", chunk)
        monkeypatch.setattr(model_module, "IN_CACHE", cached)
        loss = small(idx, targets)
        assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 1e-6
        for g, h in zip(torch.autograd.grad(loss, list(small.parameters())), grads):
            assert (g - h).abs().max() < 1e-6
    assert small(idx, torch.full_like(idx, -1)).item() == 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
def test_the_compiled_loss_is_the_loss():
    """Torch 2.11 compiled an earlier version to code that read the logits after overwriting them:
    the loss of a model at its start was 5.78 instead of 5.16."""
    logits, shares = torch.randn(70, 96), torch.rand(70, 1)
    for chunk in logits, logits[:7]:  # the second shape is compiled with symbolic sizes
        own = chunk.clone()
        log_sum = torch.compile(model_module.softmax_)(own, shares[:len(chunk)])
        assert (log_sum - chunk.double().logsumexp(1, keepdim=True)).abs().max() < 1e-5
        assert (own - chunk.double().softmax(1) * shares[:len(chunk)]).abs().max() < 1e-6


def test_loss_in_bfloat16(small):
    """Under autocast the products are bfloat16, but the loss and the gradients of the weights stay
    float32, and are as close to the exact ones as those of torch's own functions."""
    idx, targets = torch.randint(0, 96, (2, 3, 48)).unbind()
    x, W = small.norm(small.wte(idx)).flatten(0, 1), small.wte.weight
    x = x.detach().requires_grad_()
    exact = F.cross_entropy(F.linear(x.double(), W.double()), targets.flatten())
    exact = torch.stack([g.norm() for g in torch.autograd.grad(exact, (x, W))])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model_module.linear_cross_entropy(x, W, targets.flatten(), small.softmax_)
        plain = F.cross_entropy(F.linear(x, W), targets.flatten())
    assert loss.dtype == torch.float32 and abs(loss - plain) < 1e-3 * plain
    for g, h, size in zip(torch.autograd.grad(loss, (x, W)),
                          torch.autograd.grad(plain, (x, W)), exact):
        assert g.dtype == torch.float32 and (g - h).norm() < 0.02 * size


def test_no_tensor_holds_all_logits(small, monkeypatch):
    """They exist for CHUNK tokens at a time, in the forward and in the backward pass."""
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    largest, N, V, D = [], 192, 96, 16
    x, W = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    monkeypatch.setattr(model_module, "CHUNK", 64)
    with Sizes():
        loss = model_module.linear_cross_entropy(x, W, torch.zeros(N, dtype=torch.long),
                                                 small.softmax_)
        loss.backward()
    assert max(largest) == 64 * V


def z_loss(x, W, targets):
    """The mean cross-entropy of soft-capped logits, with a penalty on log Z."""
    logits = 30 * torch.tanh(F.linear(x, W).float() / 30)
    log_z = logits.logsumexp(1)
    return (log_z - logits.gather(1, targets[:, None])[:, 0] + 1e-3 * log_z.square()).mean()


def test_another_loss_is_one_line(small):
    """model.py with that line replaced: the model trains on the other loss."""
    source, line = ((REPO / "model.py").read_text(),
                    "linear_cross_entropy(x, W, targets, self.softmax_)")
    assert source.count(line) == 1
    changed = types.ModuleType("changed")
    changed.z_loss = z_loss
    exec(compile(source.replace(line, "z_loss(x, W, targets)"), "changed.py", "exec"),
         changed.__dict__)
    gpt = changed.GPT(changed.GPTConfig(**vars(SMALL)))
    gpt.load_state_dict(small.state_dict())
    idx, targets = torch.randint(0, 96, (2, 3, 48)).unbind()
    logits = small(idx).flatten(0, 1)
    expected = z_loss(logits, torch.eye(96), targets.flatten())
    assert gpt(idx, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    optimizer, losses = SFNorMuon(param_groups(gpt), lr=0.02, warmup_steps=1), []
    for _ in range(8):
        loss = gpt(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_causal(small):
    idx = torch.randint(0, 96, (1, 48))
    other = idx.clone()
    other[0, 30] = (other[0, 30] + 1) % 96
    changed = (small(idx) - small(other)).abs().amax(-1)[0]
    assert changed[:30].max() == 0 and changed[30:].min() > 0
    with pytest.raises(ValueError, match="block_size"):
        small(torch.zeros(1, 49, dtype=torch.long))


def test_generate(small):
    """Any length, reproducible, inside the vocabulary; temperature 0 and top_k 1 take the likeliest
    token."""
    idx = torch.randint(0, 96, (2, 5))
    seeded = lambda seed=0, **k: small.generate(
        idx, 60, generator=torch.Generator().manual_seed(seed), **k)
    assert seeded().shape == (2, 65) and torch.equal(seeded()[:, :5], idx)
    assert torch.equal(seeded(), seeded()) and not torch.equal(seeded(), seeded(1))
    assert (torch.equal(seeded(top_k=1), seeded(temperature=0))
            and torch.equal(seeded(temperature=0), seeded(5, temperature=0)))
    assert small.generate(idx, 1, temperature=0)[0, -1] == small(idx)[0, -1].argmax()
    assert seeded(vocab_size=20, temperature=5.0)[:, 5:].max() < 20
    top = small(idx)[:, -1].topk(3).indices
    draws = torch.cat(
        [small.generate(idx, 1, top_k=3, temperature=3.0)[:, -1:] for _ in range(30)], 1)
    assert all({*row.tolist()} == {*allowed.tolist()} for row, allowed in zip(draws, top))


def test_generation_does_without_cudnn(small, monkeypatch):
    """cuDNN's attention would build a plan for every new number of keys. Only generation is without
    it: what runs between two tokens has the caller's choice."""
    backends = torch.backends.cuda
    enabled = lambda: (backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(),
                       backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled())
    seen, forward, before = [], GPT.forward, enabled()
    monkeypatch.setattr(GPT, "forward", lambda *a, **k: seen.append(enabled()) or forward(*a, **k))
    for _ in zip(range(3), small.stream(torch.zeros(1, 4, dtype=torch.long))):
        assert enabled() == before
    assert before[0] and {*seen} == {(False, True, True, True)}
    small(torch.zeros(1, 4, dtype=torch.long))
    assert seen[-1] == before == enabled()


@pytest.mark.parametrize("config, count", [("125m_sf", 123_587_328), ("772m_sf", 772_271_360)])
def test_sizes(config, count):
    cfg = train.parse([str(REPO / f"configs/{config}.py"), "--device=cpu"])
    with torch.device("meta"):
        gpt = GPT(GPTConfig(50304, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    assert sum(p.numel() for p in gpt.parameters()) == count
    L, D, T = cfg.n_layer, cfg.n_embd, cfg.block_size
    # multiply-adds per token, forward
    products = L * (4 * D * D + 2 * D * 4 * D + 2 * T * D) + 50304 * D
    assert gpt.flops_per_token() == 3 * 2 * products
    matrices = param_groups(gpt)[0]["params"]
    assert {p.shape for p in matrices} == {(D, D), (4 * D, D), (D, 4 * D)}
    assert len(matrices) == 6 * L
