"""What a user does next: sample, export, evaluate, and take the optimizer elsewhere."""
import fcntl
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import config
import evaluate
import export_hf
import sample
from data import TokenBatches, write_shard
from model import GPT, GPTConfig
from prepare_fineweb import get_tokenizer
from test_data import TIKTOKEN, needs_gpt2
from conftest import ENV, FORKS, REPO, Run, assert_same, torchrun, tree

BOTH = pytest.mark.parametrize("name", ["byte", pytest.param("gpt2", marks=needs_gpt2)])


@pytest.fixture(scope="session")
def finished(place):
    """A run of train.py on bytes."""
    return Run(place("finished")).wait()


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a script's main() with arguments: its status, what it printed, and what it complained
    about."""
    def call(main, *argv):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, argv)])
        try:
            status = main() or 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return call


# ---------------------------------------------------------------- sampling

def test_cache(small, monkeypatch):
    """Computing each token once gives the tokens that computing all of them again gives, also past
    block_size."""
    lengths, forward, idx = [], GPT.forward, torch.randint(0, 96, (2, 5))
    again = idx
    for _ in range(60):
        again = torch.cat((again, small(again[:, -48:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    monkeypatch.setattr(GPT, "forward", lambda self, idx, **k: (
        lengths.append(idx.size(1)) or forward(self, idx, **k)))
    assert torch.equal(small.generate(idx, 60, temperature=0), again)
    assert lengths == [5] + 43 * [1] + 16 * [48]


def test_top_p(small):
    """The fewest tokens that together have at least top_p, after temperature and top_k, and only
    those."""
    idx = torch.randint(0, 96, (3, 5))
    for top_p, top_k, temperature in ((0.3, None, 1.0), (0.6, 8, 2.0),
                                      (1e-9, None, 1.0), (1.0, 3, 1.0)):
        sampling = dict(top_p=top_p, top_k=top_k, temperature=temperature)
        draws = torch.cat([small.generate(idx, 1, **sampling)[:, -1:] for _ in range(400)], 1)
        for row, logits in zip(draws, small(idx)[:, -1].double()):
            likeliest = sorted(((logits[i] / temperature).exp().item(), i)
                               for i in range(96))[::-1][:top_k]
            total, fewest, share = sum(p for p, _ in likeliest), {}, 0.0
            for p, i in likeliest:
                if share < top_p:
                    fewest[i], share = p / total, share + p / total
            assert {*row.tolist()} <= fewest.keys()
            for i, p in fewest.items():  # 400 draws, 5 standard deviations
                assert (abs((row == i).float().mean() - p / share)
                        <= 5 * math.sqrt(p / share * (1 - p / share) / 400) + 1e-9)


class Says:
    """Stands for a model that gives these tokens."""

    def __init__(self, tokens):
        self.tokens, self.wte = tokens, torch.nn.Embedding(1, 1)

    def stream(self, idx, vocab_size):
        self.prompt = idx.tolist()
        yield from (torch.tensor([[token]]) for token in self.tokens)


@BOTH
def test_stream_text(name):
    """No character is cut, though its bytes are in several tokens; the end of the document ends the
    text."""
    tokenizer = get_tokenizer(name)
    text = "naïve 🙂🜁 日本\n"
    tokens = tokenizer.encode(text).tolist()
    assert len([t for t in tokens if b"\x80" <= tokenizer.symbols[t][:1]]) > 5
    model = Says([*tokens, tokenizer.eot, *tokens])
    pieces = [*sample.stream_text(model, tokenizer, [1, 2], 100)]
    assert ("".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
            and len(pieces) == len(tokens) + 1)
    assert model.prompt == [[tokenizer.eot, 1, 2]]
    assert "".join(sample.stream_text(model, tokenizer, [], 5)) == tokenizer.decode(tokens[:5])
    assert "".join(tokenizer.symbols[t].decode("utf-8", "replace") for t in tokens) != text


def test_sample(finished, call):
    folder, ckpt = finished.folder, finished.folder / "ckpt.pt"
    status, out, err = call(sample.main, folder, "--prompt=def main(", "--tokens=30")
    assert (status, err) == (0, "") and out.startswith("def main(") and 10 < len(out) <= 40
    assert call(sample.main, ckpt, "--prompt=def main(", "--tokens=30")[1] == out
    assert call(sample.main, ckpt, "--prompt=def main(", "--tokens=30", "--seed=1")[1] != out
    (folder.parent / "start.txt").write_text("def main(")
    assert call(sample.main, ckpt, f"--prompt=FILE:{folder.parent / 'start.txt'}",
                "--tokens=30")[1] == out
    three = call(sample.main, ckpt, "--samples=3", "--tokens=20")[1].split("\n---------------\n")
    assert len(three) == 3 and len({*three}) > 1
    flags = ("--temperature=0", "--temperature=1e-45", "--temperature=1e-320", "--top_k=1",
             "--top_p=1e-6", "--top_p=1e-320")
    greedy = [call(sample.main, ckpt, "--tokens=20", flag)[1] for flag in flags]
    assert len(greedy[0]) > 10 and len({*greedy}) == 1


def test_tokenizer_of_a_checkpoint(finished, tmp_path, monkeypatch):
    """From the checkpoint; an old one's from its data, or else by the number of words."""
    saved = finished.checkpoint()
    assert saved["tokenizer"] == "byte"
    asked = []
    monkeypatch.setattr(sample, "get_tokenizer",
                        lambda name: asked.append(name) or get_tokenizer("byte"))
    old = {"tokenizer": None}
    for number, change in enumerate([{}, {"tokenizer": "other"}, old,
                                     {**old, "config": {"data_dir": "x"}}]):
        torch.save({**saved, **change}, tmp_path / f"{number}.pt")
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/meta.json").write_text('{"tokenizer": "third", "vocab_size": 1}')
    for number in range(4):
        sample.load_run(tmp_path / f"{number}.pt")
    assert asked == ["byte", "other", "third", "byte"]


@pytest.mark.parametrize("argv, status, words", [
    (["nowhere"], 2, "nowhere"), (["noise.pt"], 1, "noise.pt"), (["other.pt"], 1, "other.pt"),
    (["run", "--prompt="], 2, "prompt"),
    (["run", "--temperature=-1"], 2, "temperature"),
    (["run", "--temperature=nan"], 2, "temperature"),
    (["run", "--temperature=inf"], 2, "temperature"), (["run", "--top_p=0"], 2, "top_p"),
    (["run", "--top_p=1.5"], 2, "top_p"),
    (["run", "--top_k=0"], 2, "top_k"), (["run", "--tokens=0"], 2, "tokens"),
    (["run", "--samples=0"], 2, "samples"), (["run", "--seed=-1"], 2, "seed"),
    (["run", "--tokens=x"], 2, "tokens"),
    (["run", "--device=abacus"], 2, "abacus"), (["run", "--device=xpu"], 2, "xpu"),
    (["run", "--prompt=FILE:nowhere"], 2, "nowhere"),
    (["run", "--prompt=FILE:noise.pt"], 2, "noise.pt"), (["run", "--topp=1"], 2, "topp"),
    ([], 2, "run"),
    (["tokenizer.pt"], 1, "abacus"), (["nan.pt"], 1, "not finite"),
    pytest.param(["words.pt"], 1, "gpt2", marks=needs_gpt2)], ids=str)
def test_sample_asked_wrongly(finished, tmp_path, monkeypatch, call, argv, status, words):
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(finished.folder)
    Path("noise.pt").write_bytes(np.random.default_rng(0).bytes(1000))
    saved = finished.checkpoint()
    torch.save({**saved, "model": {}}, "other.pt")
    torch.save({**saved, "tokenizer": "abacus"}, "tokenizer.pt")
    torch.save({**saved, "tokenizer": "gpt2"}, "words.pt")
    torch.save({**saved, "model": {k: v * math.nan for k, v in saved["model"].items()}}, "nan.pt")
    got, out, err = call(sample.main, *argv)
    assert ((got, out) == (status, "") and words in err and err.count("\n") == 1
            and len(err) < 400), (got, err)


def test_sample_streams(finished):
    """The command; a reader that has seen enough ends it quietly."""
    process = subprocess.Popen(
        [sys.executable, REPO / "sample.py", finished.folder, "--tokens=1000000"], env=ENV,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(20)) == 20 and process.poll() is None
    process.stdout.close()
    assert process.wait(60) != 0 and process.stderr.read() == b""


# ---------------------------------------------------------------- export

def text_for(name):
    """What a tokenizer can stumble over: many languages, blanks, and for GPT-2 real English where
    it is at hand."""
    texts = ["def main(x):\n    return 'naïve 🙂🜁 日本'\r\n\t\x00", " don't  a , b . n't  \n\n ", "",
             "\u00a0\u2028é ", "a" * 1000]
    wikitext = Path(TIKTOKEN).parent / "data/wikitext2.parquet"
    if wikitext.exists():
        import pyarrow.parquet
        texts += pyarrow.parquet.read_table(wikitext)["text"].to_pylist()[:1500]
    return texts


@BOTH
def test_export(finished, tmp_path, call, name):
    """transformers loads it by itself: our logits, our tokens, our text."""
    transformers = pytest.importorskip("transformers")
    saved, run, tokenizer = finished.checkpoint(), finished.folder, get_tokenizer(name)
    if name == "gpt2":
        torch.manual_seed(0)
        gpt, run = GPT(GPTConfig(50304, 16, 1, 2, 8)), tmp_path / "gpt2.pt"
        torch.save({**saved, "model": gpt.state_dict(), "model_config": vars(gpt.config),
                    "tokenizer": "gpt2"}, run)
    assert call(export_hf.main, run, tmp_path / "a/out")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a/out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a/out")
    gpt, _, _ = sample.load_run(run)
    assert type(model).__name__ == "ArceeForCausalLM" and model.dtype == torch.float32
    assert len(theirs) == tokenizer.vocab_size
    idx = torch.randint(0, tokenizer.vocab_size, (2, gpt.config.block_size))
    logits = model(idx).logits
    assert (logits.shape == (*idx.shape, gpt.config.vocab_size)
            and (logits - gpt(idx)).abs().max() < 1e-5)
    for ids in (model.config, model.generation_config, theirs):
        assert ids.eos_token_id == ids.bos_token_id == tokenizer.eot
    for text in text_for(name):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    assert theirs.decode([tokenizer.eot]) == "<|endoftext|>"
    card = (tmp_path / "a/out/README.md").read_text()
    assert "transformers >= 4.53" in card  # older ones know no Arcee
    assert (f"{sum(p.numel() for p in gpt.parameters()):,}" in card
            and f"{saved['tokens']:,}" in card)
    assert ('"optimizer": "sf_normuon"' in card
            and f"\n# {'gpt2' if name == 'gpt2' else run.name}\n" in card)
    if name == "byte":
        loss = list(finished.values("val_loss").values())[-1]
        assert f"at step 12 | {loss:.4f} nats" in card and f"{math.exp(loss):.2f}" in card
        greedy = model.generate(idx[:1, :5], max_new_tokens=20, do_sample=False)
        assert torch.equal(greedy, gpt.generate(idx[:1, :5], greedy.size(1) - 5, temperature=0,
                                                vocab_size=257))


def test_export_of_a_damaged_log_or_config(finished, tmp_path, call):
    pytest.importorskip("transformers")
    shutil.copytree(finished.folder, tmp_path / "run")
    with (tmp_path / "run/log.jsonl").open("a") as log:
        log.write('{"val_loss": }\nnull\n{"val_loss": 1}\n')
    assert call(export_hf.main, tmp_path / "run", tmp_path / "out")[0] == 0
    loss = list(finished.values("val_loss").values())[-1]
    assert f"at step 12 | {loss:.4f} nats" in (tmp_path / "out/README.md").read_text()
    torch.save({**finished.checkpoint(), "config": {}}, tmp_path / "bare.pt")
    status, _, err = call(export_hf.main, tmp_path / "bare.pt", tmp_path / "other")
    assert status == 1 and "bare.pt" in err and "optimizer" in err and err.count("\n") == 1


def test_padded_batches(finished, tmp_path, call):
    """Texts of different lengths, generated together, are those that are generated one by one."""
    transformers = pytest.importorskip("transformers")
    assert call(export_hf.main, finished.folder, tmp_path / "out")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a", "def main(", "for"]
    generate = lambda batch: model.generate(**batch, max_new_tokens=20, do_sample=False)
    together = generate(tokenizer(texts, padding=True, return_tensors="pt"))
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    for text, row in zip(texts, together):
        alone = generate(tokenizer(text, return_tensors="pt"))[0]
        ended = tokenizer.decode(row, skip_special_tokens=True)
        assert ended.startswith(text) and ended == tokenizer.decode(alone, skip_special_tokens=True)
    # The class's name in transformers 4, which also 5 reads.
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "out/tokenizer_config.json").read_text()


def without(module, script, *argv):
    """The script, as a process of its own where this module cannot be imported."""
    code = (f"import runpy, sys; sys.modules[{module!r}] = None; "
            f"sys.argv = [{script!r}, *sys.argv[1:]];"
            f"runpy.run_path({str(REPO / script)!r}, run_name='__main__')")
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)


def test_export_without_transformers(finished, tmp_path):
    """Also an old version, which lacks the model: one line that says what to install."""
    result = without("transformers", "export_hf.py", finished.folder, tmp_path / "out")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "transformers >= 4.53" in result.stderr and not (tmp_path / "out").exists()


def test_reading_needs_no_lock(finished, tmp_path):
    """Windows has no fcntl; sampling and exporting lock nothing."""
    result = without("fcntl", "sample.py", finished.folder, "--tokens=5")
    assert result.returncode == 0 and result.stdout, result.stderr
    result = without("fcntl", "export_hf.py", finished.folder, tmp_path / "out")
    assert result.returncode == 0 and (tmp_path / "out/model.safetensors").exists(), result.stderr


def test_reports_need_no_sigpipe():
    """Which Windows lacks."""
    code = ("import runpy, signal, sys; del signal.SIGPIPE; sys.argv = ['compare.py', '--help'];"
            "runpy.run_path('experiments/compare.py', run_name='__main__')")
    env = {**ENV, "PYTHONPATH": f"{REPO / 'experiments'}:{ENV['PYTHONPATH']}"}
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, text=True,
                            capture_output=True, timeout=100)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr


def test_export_spares_what_is_there(finished, tmp_path, call):
    pytest.importorskip("transformers")
    for name, content in (("README.md", "mine"), ("config.json", "{}")):
        (tmp_path / name).write_text(content)
        before = tree(tmp_path)
        status, out, err = call(export_hf.main, finished.folder, tmp_path)
        assert (status == 2 and not out and err.count("\n") == 1 and "not an earlier export" in err
                and tree(tmp_path) == before)
    assert call(export_hf.main, finished.folder, finished.folder)[0] == 2
    assert call(export_hf.main, finished.folder, tmp_path / "config.json")[0] == 2
    (tmp_path / "noise.pt").write_bytes(bytes(1000))
    for bad, expected in (("nowhere", 2), (tmp_path / "noise.pt", 1)):
        status, out, err = call(export_hf.main, bad, tmp_path / "out")
        assert (status == expected and not out and err.count("\n") == 1
                and not (tmp_path / "out").exists())
    for _ in range(2):
        assert call(export_hf.main, finished.folder / "ckpt.pt", tmp_path / "out")[0] == 0
        (tmp_path / "out/model.safetensors").write_bytes(b"")
    call(export_hf.main, finished.folder / "ckpt.pt", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_size > 1000

    (tmp_path / "out/.export.new").mkdir()  # of one that was killed
    (tmp_path / "out/.export.new/x").touch()
    assert (call(export_hf.main, finished.folder, tmp_path / "out")[0] == 0
            and not (tmp_path / "out/.export.new").exists())

    torch.save({**finished.checkpoint(), "step": 5}, tmp_path / "other.pt")
    before = tree(tmp_path / "out")  # a disk that is full leaves it whole
    command = (f"ulimit -f 64; exec {sys.executable} {REPO / 'export_hf.py'} "
               f"{tmp_path / 'other.pt'} {tmp_path / 'out'}")
    result = subprocess.run(["bash", "-c", command], env=ENV, capture_output=True,
                            text=True, timeout=300)
    assert (result.returncode == 1 and result.stderr.count("\n") == 1
            and "export_hf.py:" in result.stderr), result.stderr
    assert tree(tmp_path / "out") == before
    assert (call(export_hf.main, tmp_path / "other.pt", tmp_path / "out")[0] == 0
            and tree(tmp_path / "out") != before)


# ---------------------------------------------------------------- the optimizer elsewhere

def test_trainer(tmp_path):
    """Checkpoints hold x, also without an evaluation before them, and training goes on from them
    exactly."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trained(out):
        command = [sys.executable, REPO / "examples/hf_trainer.py", out, "12"]
        result = subprocess.run(command, env={**ENV, "CUDA_VISIBLE_DEVICES": ""},
                                capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return float(result.stdout.split()[-1])

    def checkpoint(out, step):
        model = load_file(out / f"checkpoint-{step}/model.safetensors")
        return {"model": model,
                "optimizer": torch.load(out / f"checkpoint-{step}/optimizer.pt", weights_only=True)}

    whole = trained(tmp_path / "whole")
    # as if it had been killed after step 8
    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "cut/checkpoint-8")
    assert trained(tmp_path / "cut") == whole
    a, b = checkpoint(tmp_path / "whole", 12), checkpoint(tmp_path / "cut", 12)
    assert_same(a, b, parts=["model", "optimizer"])
    for step in (4, 8, 12):
        groups = checkpoint(tmp_path / "whole", step)["optimizer"]["param_groups"]
        assert {(g["step"], g["train_mode"], g["lr"]) for g in groups} == {(step, False, 0.02)}


def run_example(path, argv, environment):
    """In a forked process: become `python path argv`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


def test_fsdp2(tmp_path):
    """A run that goes on, on as many processes or on others, is the uninterrupted run."""
    no_card = {"CUDA_VISIBLE_DEVICES": ""}

    def trained(out, n, by="fork"):
        argv, path = [str(tmp_path / out), "12"], str(REPO / "examples/fsdp2.py")
        if by == "torchrun":
            return subprocess.run([*torchrun(n), path, *argv], env={**ENV, **no_card}, check=True,
                                  timeout=300)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": str(s.getsockname()[1]), **no_card}
        forks = [FORKS.Process(target=run_example, args=(path, argv, {**common, "RANK": str(rank)}))
                 for rank in range(n)]
        [fork.start() for fork in forks]
        [fork.join(120) for fork in forks]
        assert [fork.exitcode for fork in forks] == [0] * n

    def state(out):
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
        dcp_to_torch_save(tmp_path / out / "000012", tmp_path / f"{out}.pt")
        return torch.load(tmp_path / f"{out}.pt", weights_only=True)

    trained("whole", 2, "torchrun")
    for out, n in (("cut", 2), ("three", 3)):
        shutil.copytree(tmp_path / "whole/000006", tmp_path / out / "000006")
        trained(out, n)
    whole = state("whole")
    assert_same(whole, state("cut"), parts=["model", "optimizer", "step"])
    assert_same(whole, state("three"), 1e-5, parts=["model", "step"])
    assert whole["step"] == 12 and not whole["optimizer"]["param_groups"][0]["train_mode"]
    assert whole["optimizer"]["state"]["1.weight"]["row_second_moment"].shape == (64, 1)


def test_install(tmp_path):
    """pip installs one module, which needs nothing else of the repository."""
    for name in ("pyproject.toml", "sf_normuon.py", "model.py", "README.md", "LICENSE"):
        (tmp_path / "source").mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site",
           tmp_path / "source"]
    result = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if "No matching distribution" in result.stderr:
        pytest.skip("pip cannot reach a package index for setuptools")
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (tmp_path / "site").glob("*.py")} == {"sf_normuon.py"}
    code = "import sf_normuon; print(sf_normuon.SFNorMuon, sf_normuon.__file__)"
    env = {**ENV, "PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True,
                         text=True, check=True).stdout
    assert str(tmp_path / "site/sf_normuon.py") in out


# ---------------------------------------------------------------- evaluation alone

def figures(out):
    return [float(re.search(rf"{name} +([0-9.]+)", out)[1])
            for name in ("validation loss", "perplexity", "bits per byte")]


def test_eval_only(finished, cwd):
    """The loss that was logged, whatever holds the folder, on any number of processes; nothing is
    written."""
    shutil.copytree(finished.folder, cwd / "run")
    before, losses = tree(cwd), [*finished.values("val_loss").values()]
    with open(cwd / "run/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        one = Run(cwd, "--eval_only").wait()
        assert one.err == "" and tree(cwd) == before
        two = Run(cwd, eval_only=True, processes=2).wait()
    loss, perplexity, bits = figures(one.out)
    assert (loss == pytest.approx(losses[-1], abs=2e-6)
            and loss != pytest.approx(losses[-2], abs=1e-3))
    assert perplexity == pytest.approx(math.exp(losses[-1]), rel=1e-5)
    # no ends of documents in there
    assert bits == pytest.approx(losses[-1] / math.log(2), abs=1e-5)
    assert (figures(two.out) == pytest.approx([loss, perplexity, bits], rel=1e-5)
            and tree(cwd) == before)


def test_eval_only_elsewhere(finished, cwd, data, tokens):
    """Other shards, no training shards, another folder; the ends of documents have no bytes."""
    (cwd / "other").mkdir()
    other = np.where(np.arange(900) % 50 == 7, 256, tokens[7000:7900])
    write_shard(cwd / "other/y_val_000000.bin", other)
    shutil.copy(data / "meta.json", cwd / "other")
    before = tree(cwd)
    run = Run(cwd, eval_only=True, data_dir="other", init_from=finished.folder / "ckpt.pt",
              eval_tokens=10**9, lr=3).wait()
    gpt = GPT(GPTConfig(**finished.checkpoint()["model_config"]))
    gpt.load_state_dict(finished.checkpoint()["model"])
    x = torch.from_numpy(other[: 14 * 64 + 1].astype(np.int64))
    with torch.no_grad():
        nats = F.cross_entropy(gpt(x[:-1].view(14, 64)).double().flatten(0, 1), x[1:],
                               reduction="sum").item()
    expected = [nats / (14 * 64), math.exp(nats / (14 * 64)),
                nats / math.log(2) / (x[1:] < 256).sum().item()]
    assert (figures(run.out) == pytest.approx(expected, rel=1e-5)
            and "896 tokens of other" in run.out and tree(cwd) == before)

    assert figures(Run(cwd, eval_only=True, data_dir="other", init_from=finished.folder,
                       eval_tokens=10**9).wait().out) == figures(run.out)
    Run(cwd, eval_only=True, out_dir="nowhere").wait(2).complaint(
        "nowhere/ckpt.pt", "no such checkpoint")
    (cwd / "noise.pt").write_bytes(bytes(1000))
    Run(cwd, eval_only=True, init_from="noise.pt").wait(1).complaint("noise.pt")
    saved = finished.checkpoint()
    torch.save({**saved, "model": {k: v * math.nan for k, v in saved["model"].items()}},
               cwd / "nan.pt")
    Run(cwd, eval_only=True, init_from="nan.pt").wait(1).complaint("nan.pt", "damaged")
    torch.save({**saved, "model": {f"_orig_mod.{k}": v for k, v in saved["model"].items()}},
               cwd / "other.pt")
    Run(cwd, eval_only=True, init_from="other.pt").wait(1).complaint(
        "other.pt", "does not hold the model")
    Run(cwd, eval_only=True, n_layer=3, init_from=finished.folder / "ckpt.pt").wait(2).complaint(
        "n_layer", "3")
    (cwd / "other/meta.json").write_text('{"tokenizer": "abacus", "vocab_size": 257}')
    run = Run(cwd, eval_only=True, data_dir="other", init_from=finished.folder / "ckpt.pt").wait(2)
    run.complaint("byte tokens", "abacus tokens")


@BOTH
def test_bits_per_byte(tmp_path, name):
    """Against the length of the text that the evaluated tokens stand for."""
    tokenizer = get_tokenizer(name)
    documents = [tokenizer.encode(text) for text in text_for(name)[:40] for _ in range(3)]
    tokens = np.concatenate([part for document in documents
                             for part in ([tokenizer.eot], document)])
    write_shard(tmp_path / "x_val_000000.bin", tokens)
    cfg = config.parse(["--block_size=16", "--total_batch_tokens=256", "--eval_tokens=1700",
                        "--device=cpu"])
    targets = tokens[1 : 1 + 1700 // 16 * 16]
    size = sum(len(tokenizer.symbols[t]) for t in targets if t != tokenizer.eot)
    text = tokenizer.decode([t for t in targets if t != tokenizer.eot]).encode()
    assert abs(size - len(text)) < 8  # the last character may be cut, and then decodes to another
    data = TokenBatches(tmp_path, "val", 16, 50304)
    assert evaluate.bits_per_byte(cfg, data, tokenizer, 2.5) == pytest.approx(
        2.5 * len(targets) / math.log(2) / size, rel=1e-12)


def test_no_sample_unless_all_processes_can(monkeypatch):
    """GPT-2's tokenizer may be at hand on one node only; the others would wait for its part of the
    model."""
    monkeypatch.setattr(evaluate, "gather", lambda value: [value, None])
    assert evaluate.sample(config.Config(), None, {"tokenizer": "byte"}) == ""
