"""A checkpoint as a Hugging Face folder, which transformers and lm-eval read without code of ours.

    python export_hf.py runs/x out/            a run's folder, or a ckpt.pt
    lm_eval --model hf --model_args pretrained=out/ --tasks hellaswag
    hf upload you/x out/                       publishes it

Needs transformers >= 4.53, here and where the folder is read. The weights stay float32. Unlike
ours, the tokenizer takes "<|endoftext|>" in a text for the token of that name.
"""
import argparse
import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

from prepare_fineweb import fail
from sample import load_run

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sf-normuon, export_hf.py]
---
"""  # a folder whose README.md begins so is an earlier export


def hf_state(model):
    """The weights under the names of ArceeForCausalLM; the output head is tied and has none."""
    names = {"^wte": "model.embed_tokens", "^norm": "model.norm", "^blocks": "model.layers",
             "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
             "(up|down)": r"\1_proj", r"\.attn\.(.)": r".self_attn.\1_proj"}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = re.sub(ours, theirs, name)
        state[name] = tensor.contiguous()
    return state


def bpe_merges(symbols):
    """The pairs of symbols that byte-pair encoding joined, in order, from the tokens that it made.

    A token's pair is what remains of its bytes once all pairs that were found earlier are joined.
    """
    ranks, merges = {symbol: rank for rank, symbol in enumerate(symbols)}, []
    for symbol in symbols:
        parts = [symbol[i : i + 1] for i in range(len(symbol))]
        rank = lambda i: ranks.get(parts[i] + parts[i + 1], math.inf)
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=rank)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def hf_tokenizer(tokenizer, block_size):
    """Byte-level BPE as in GPT-2; the byte tokenizer has no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, eot = bytes_to_unicode(), "<|endoftext|>"
    text = lambda symbol: "".join(letters[byte] for byte in symbol)
    symbols = tokenizer.symbols[: tokenizer.eot]  # eot is the last token of both tokenizers
    vocab = {name: token for token, name in enumerate([*map(text, symbols), eot])}
    bpe = Tokenizer(models.BPE(vocab, [(text(a), text(b)) for a, b in bpe_merges(symbols)]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # padding on the left: new tokens follow the text
        tokenizer_object=bpe, bos_token=eot, eos_token=eot, pad_token=eot, padding_side="left",
        model_input_names=["input_ids", "attention_mask"], model_max_length=block_size,
        clean_up_tokenization_spaces=False)


def model_card(run, model, saved):
    run, cfg, evaluations = Path(run).resolve(), saved["config"], []
    folder = run if run.is_dir() else run.parent
    name = run.stem
    if run.is_dir() or run.name == "ckpt.pt":  # another file may come from another run
        name, log = folder.name, folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may cut a line
                if "val_loss" in (e := json.loads(line)) and e["step"] <= saved["step"]:
                    evaluations.append(e)
    figures = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}",
               "tokens": f"{saved['tokens']:,}", "steps": f"{saved['step']:,}",
               "optimizer": cfg["optimizer"], "data": cfg["data_dir"]}
    for e in evaluations[-1:]:
        figures[f"validation loss at step {e['step']:,}"] = f"{e['val_loss']:.4f} nats per token"
        figures["perplexity"] = f"{math.exp(min(e['val_loss'], 700)):.2f}"
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    knobs = json.dumps({key: value for key, value in cfg.items() if key != "out_dir"}, indent=1)
    return (f"{CARD}# {name}\n\nNeeds transformers >= 4.53. In training, every document follows "
            "the token `<|endoftext|>`: start a text with it.\n\n"
            f"| | |\n|---|---|\n{rows}\n\n"
            f"The configuration of the run:\n\n```json\n{knobs}\n```\n")


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
    except ImportError:
        fail("needs transformers >= 4.53: pip install -U transformers", 1)
    out, card, new = args.out, args.out / "README.md", args.out / ".export.new"
    try:
        ours = card.is_file() and card.read_bytes().startswith(CARD.encode())
        if out.exists() and any(f != new for f in out.iterdir()) and not ours:
            fail(f"{out} is not empty and not an earlier export: give another folder")
        model, tokenizer, saved = load_run(args.run)
        c, eot = model.config, {f"{use}_token_id": tokenizer.eot for use in ("bos", "eos", "pad")}
        padding = [*range(tokenizer.vocab_size, c.vocab_size)] or None
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)  # a failure leaves out/ as it was
        (new / card.name).write_text(model_card(args.run, model, saved))
        ArceeConfig(
            architectures=["ArceeForCausalLM"], vocab_size=c.vocab_size, hidden_size=c.n_embd,
            max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_head,
            intermediate_size=4 * c.n_embd, hidden_act="relu2", rms_norm_eps=1e-5,
            rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
            bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, dtype="float32",
        ).save_pretrained(new)
        GenerationConfig(**eot, do_sample=True, suppress_tokens=padding).save_pretrained(new)
        hf_tokenizer(tokenizer, c.block_size).save_pretrained(new)
        names = new / "tokenizer_config.json"  # transformers 5 has a name that 4 cannot read
        names.write_text(names.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        save_file(hf_state(model), new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # save_file lets only its owner read it
        for file in sorted(new.iterdir()):  # README.md first: a rerun knows the folder
            os.replace(file, out / file.name)
    except (FileNotFoundError, NotADirectoryError) as e:
        fail(e)
    except KeyError as e:
        fail(f"{args.run}: its config has no {e}", 1)
    except (OSError, ValueError, SafetensorError) as e:
        fail(e, 1)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{out}: for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained")


if __name__ == "__main__":
    main()
