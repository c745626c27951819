"""A checkpoint as a Hugging Face folder, which transformers and lm-eval read without code of ours.

    python export_hf.py runs/x out/                   a run's folder, or a ckpt.pt; out/ must be new, empty or an export
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag
    hf upload you/x out/                              publishes it (huggingface-cli upload, in older hubs)

The weights stay float32 and the vocabulary padded. Unlike ours, the tokenizer takes "<|endoftext|>" in a text for the
token.
"""
import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

from sample import fail, load_run

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sf-normuon, export_hf.py]
---
"""  # by which an earlier export is known


def hf_state(model):
    """The weights under the names of ArceeForCausalLM; the output head is tied and has none."""
    names = {"^wte": "model.embed_tokens", "^norm": "model.norm", "^blocks": "model.layers", "(up|down)": r"\1_proj",
             "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", r"\.attn\.(.)": r".self_attn.\1_proj"}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        state[name] = tensor.contiguous()
    return state


def bpe_merges(symbols):
    """The pairs that byte-pair encoding joined, in order, from the tokens that it made of them.

    A token joins the two parts that remain of its bytes when only pairs found before it are joined.
    """
    ranks, merges = {symbol: rank for rank, symbol in enumerate(symbols)}, []
    for symbol in symbols:
        parts = [symbol[i : i + 1] for i in range(len(symbol))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def hf_tokenizer(tokenizer, block_size):
    """Byte-level BPE as GPT-2's; for bytes alone there is nothing to merge."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    text = lambda symbol: "".join(letters[byte] for byte in symbol)
    symbols = tokenizer.symbols[: tokenizer.eot]  # eot is the last token of both
    vocab = {text(symbol): token for token, symbol in enumerate(symbols)}
    merges = [(text(a), text(b)) for a, b in bpe_merges(symbols)]
    return GPT2Tokenizer({**vocab, "<|endoftext|>": tokenizer.eot}, merges, model_max_length=block_size,
                         clean_up_tokenization_spaces=False)


def model_card(run, model, saved):
    path, evaluations = Path(run).resolve(), []
    folder = path if path.is_dir() else path.parent
    log, name = folder / "log.jsonl", path.stem if path.is_file() and path.name != "ckpt.pt" else folder.name
    if log.exists() and (path.is_dir() or path.name == "ckpt.pt"):  # another file may be of another run
        entries = (json.loads(line) for line in log.read_text().splitlines() if line.endswith("}"))
        evaluations = [entry for entry in entries if "val_loss" in entry and entry["step"] <= saved["step"]]
    cfg = saved["config"]
    figures = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "tokens": f"{saved['tokens']:,}",
               "steps": f"{saved['step']:,}", "optimizer": cfg["optimizer"], "data": cfg["data_dir"]}
    if evaluations:
        loss, step = evaluations[-1]["val_loss"], evaluations[-1]["step"]
        figures[f"validation loss at step {step:,}"] = f"{loss:.4f} nats per token"
        figures["perplexity"] = f"{math.exp(min(loss, 700)):.2f}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    knobs = json.dumps({key: value for key, value in cfg.items() if key != "out_dir"}, indent=1)
    return (f"{CARD}# {name}\n\nIn training, every document follows the token `<|endoftext|>`: start a "
            f"text with it.\n\n| | |\n|---|---|\n{rows}\n\nThe configuration of the run:\n\n"
            f"```json\n{knobs}\n```\n")


def main():
    parser = argparse.ArgumentParser(description="Write a checkpoint as a Hugging Face folder.")
    parser.error = fail
    parser.add_argument("run", help="a run's folder, or a ckpt.pt")
    parser.add_argument("out", type=Path, help="a folder that is new, empty or an earlier export")
    args = parser.parse_args()
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        from transformers import ArceeConfig, GenerationConfig
    except ImportError as e:
        fail(f"{e}: pip install transformers", 1)
    out, card, new = args.out, args.out / "README.md", args.out / ".export.new"
    try:
        if out.exists() and any(f != new for f in out.iterdir()) and not (card.exists() and card.read_bytes().startswith(CARD.encode())):
            fail(f"{out} is not empty and not an earlier export: give another folder")
        model, tokenizer, saved = load_run(args.run)
        c, eot = model.config, {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)  # what fails leaves out/ as it was
        (new / card.name).write_text(model_card(args.run, model, saved))
        ArceeConfig(
            architectures=["ArceeForCausalLM"], vocab_size=c.vocab_size, max_position_embeddings=c.block_size,
            num_hidden_layers=c.n_layer, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, hidden_act="relu2",
            num_attention_heads=c.n_head, num_key_value_heads=c.n_head, rms_norm_eps=1e-5, rope_theta=10000.0,
            tie_word_embeddings=True, attention_bias=False, mlp_bias=False, dtype="float32", **eot).save_pretrained(new)
        GenerationConfig(**eot, pad_token_id=tokenizer.eot, do_sample=True,
                         suppress_tokens=[*range(tokenizer.vocab_size, c.vocab_size)] or None).save_pretrained(new)
        hf_tokenizer(tokenizer, c.block_size).save_pretrained(new)
        save_file(hf_state(model), new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # it comes readable by its owner only
        for file in sorted(new.iterdir()):  # README.md first: what is interrupted can be done again
            os.replace(file, out / file.name)
    except (FileNotFoundError, NotADirectoryError) as e:
        fail(e)
    except (OSError, ValueError, SafetensorError) as e:
        fail(e, 1)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{out}: for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained")


if __name__ == "__main__":
    main()
