"""Text from a checkpoint, streamed as it is made.

    python sample.py runs/quickstart --prompt "def main("         a run's folder, or a ckpt.pt
    python sample.py runs/quickstart --prompt=FILE:start.txt --samples=3 --top_p=0.9
    python sample.py runs/quickstart --temperature=0              the likeliest document
"""
import argparse
import codecs
import math
import signal
import sys
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds
    for name in {"SIGINT", "SIGPIPE"} & {*dir(signal)}:  # Ctrl-C, or a reader like `head`: just end
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import torch

from data import read_meta
from model import GPT, GPTConfig
from prepare_fineweb import fail, get_tokenizer
from state import load


def load_run(run, device="cpu"):
    """The model in float32, the tokenizer and the checkpoint of a run's folder or of a ckpt.pt.

    FileNotFoundError if there is none, ValueError if it or its tokenizer cannot be loaded.
    """
    path = Path(run)
    saved = load(path)
    try:
        with torch.device("meta"):  # the weights come from the file
            model = GPT(GPTConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"], assign=True)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{path} does not hold the model it describes: {str(e):.100}") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{path} holds weights that are not finite: take an earlier copy")
    vocab_size, name = model.config.vocab_size, saved.get("tokenizer")
    if name is None:  # old checkpoints do not say
        try:
            name = read_meta(saved["config"]["data_dir"])["tokenizer"]
        except (OSError, ValueError, KeyError):
            name = "gpt2" if vocab_size >= 50257 else "byte"
    try:
        tokenizer = get_tokenizer(name)
    except Exception as e:  # tiktoken downloads, which can fail in any way
        raise ValueError(f"{path}: cannot load its tokenizer {name!r}: {e}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{path}: {vocab_size} words are too few for its tokenizer {name!r}")
    return model.to(device), tokenizer, saved


def stream_text(model, tokenizer, prompt, tokens, **sampling):
    """Continues `prompt`, a list of tokens, by at most `tokens` tokens, up to the document's end:
    yields text in pieces. sampling: as for `GPT.stream`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens can split a character
    idx = torch.tensor([[tokenizer.eot, *prompt]], device=model.wte.weight.device)
    for token in islice(model.stream(idx, vocab_size=tokenizer.vocab_size, **sampling), tokens):
        if token == tokenizer.eot:
            break
        yield decoder.decode(tokenizer.symbols[token])
    yield decoder.decode(b"", final=True)


def arguments():
    parser = argparse.ArgumentParser(description="Text from a checkpoint, streamed as it is made.")
    parser.error = fail
    add = parser.add_argument
    add("run", help="a run's folder, or a ckpt.pt")
    add("--prompt", help="the text to continue, or FILE:path (default: the start of a document)")
    add("--samples", type=int, default=1)
    add("--tokens", type=int, default=500, help="at most, for each sample (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: likeliest token (default: %(default)s)")
    add("--top_k", type=int, help="draw from the k likeliest tokens")
    add("--top_p", type=float, help="draw from the fewest tokens that reach this probability")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    valid = {"samples": args.samples > 0, "tokens": args.tokens > 0, "seed": 0 <= args.seed < 2**63,
             "temperature": 0 <= args.temperature < math.inf,
             "top_k": args.top_k is None or args.top_k > 0,
             "top_p": args.top_p is None or 0 < args.top_p <= 1}
    for name, ok in valid.items():
        if not ok:
            fail(f"--{name} cannot be {getattr(args, name)}")
    return args


def main():
    args = arguments()
    try:
        torch.empty(0, device=args.device)  # a generator takes the number of a missing card
        generator = torch.Generator(args.device).manual_seed(args.seed)
    except Exception:  # each kind of device that is missing has its own
        fail(f"--device {args.device}: torch has no such device here")
    prompt = args.prompt
    try:
        if prompt and prompt.startswith("FILE:"):
            prompt = Path(prompt[5:]).read_text("utf-8")
        model, tokenizer, _ = load_run(args.run, args.device)
    except UnicodeDecodeError as e:
        fail(f"{args.prompt}: not UTF-8 ({e})")
    except (OSError, ValueError) as e:
        fail(e, 2 if isinstance(e, OSError) else 1)
    tokens = [] if prompt is None else tokenizer.encode(prompt).tolist()
    if prompt is not None and not tokens:
        fail("the prompt is empty; without --prompt, a sample is a document from its start")
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                    generator=generator)
    cuda = torch.device(args.device).type == "cuda"
    for i in range(args.samples):
        print("---------------\n" * (i > 0) + (prompt or ""), end="", flush=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            for text in stream_text(model, tokenizer, tokens, args.tokens, **sampling):
                print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack characters of the text
    main()
