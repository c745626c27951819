"""The comparison, settled: every method tuned with the same budget, 1x, 4x and 16x, on the bytes of
the Linux kernel's C files (experiments/corpora.py says how to get them).

Configurations are drawn by a seed and thinned over 1x and 4x, on two seeds and on validation text
that are not reported. The four methods that carry claims have 12 configurations each, the others 6.
This file was written before any of its runs, which are some 2.5 billion tokens.
"""
base = dict(
    data_dir="data/linux", vocab_size=320, n_layer=2, n_head=3, n_embd=48,  # 70,896 parameters
    block_size=32, batch_size=64, total_batch_tokens=2048,
    eval_interval=173, eval_tokens=262144, log_interval=173,
    device="cpu", dtype="float32", compile=True)
tokens = 692 * 2048  # 1x: 20 for each parameter
horizons = 1, 4, 16
seeds = range(10)
tuning_seeds = 100, 101
tuning = dict(eval_offset=262144)  # the next 262,144 tokens of the validation text
rungs, draws, draw_seed = (1, 4), 12, 2605

margin = 0.015  # nats: two methods closer than this are called equal
claims = [("anytime", rival, h) for rival in ("normuon", "amuse", "adamw") for h in (4, 16)]
headline = {"hindsight.recommended": "SF-NorMuon, recommended",
            "horizon.normuon": "NorMuon, hand-tuned",
            "horizon.adamw": "AdamW, hand-tuned", "adamw": "AdamW, random search",
            "paper": "SF-NorMuon, the paper's", "sf_adamw": "SF-AdamW",
            "hindsight.amuse_late": "AMUSE, T0 = 1,000"}
panels = {"Linux, where they were tuned": "settled", "Go": "elsewhere_go",
          "English": "elsewhere_english", "Linux, 0.15M parameters": "elsewhere_148k"}


def both(decay):  # for matrices and for everything else
    return dict(weight_decay=decay, adam_weight_decay=decay)


def decays(*values):
    return [both(decay) for decay in values]


def beta1(*values, beta2=0.95, adam_beta2=0.99):
    return [dict(betas=(beta, beta2), adam_betas=(beta, adam_beta2)) for beta in values]


warmup = [50, 100, 200]
schedule = ["cosine", "linear", "wsd"]
few = dict(draws=6, seeds=range(5))  # carries no claim
shorter = dict(few, horizons=(1, 4))  # declared to 16x; cut, which saves 0.4 billion tokens

optimizers = {
    "anytime": dict(optimizer="sf_normuon", space=dict(
        lr=(0.006, 0.1), decay=decays(0.0125, 0.025, 0.05, 0.1), decay_at=["z", "y"],
        warmup_steps=warmup, beta=beta1(0.4, 0.6, 0.9), momentum=[0.8, 0.9, 0.95],
        averaging_power=[0.0, 1.0, 2.0], beta_power=[0.0, 0.2, 0.3, 0.5])),
    "normuon": dict(optimizer="normuon", space=dict(
        lr=(0.006, 0.1), decay=decays(0.0125, 0.025, 0.05, 0.1), schedule=schedule,
        warmup_steps=warmup, momentum=[0.9, 0.95],
        adam_betas=[(0.9, 0.95), (0.9, 0.99), (0.8, 0.95)])),
    "amuse": dict(optimizer="amuse", space=dict(
        lr=(0.01, 0.16), decay=decays(0.0125, 0.025, 0.05, 0.1),
        warmup_steps=[100, 250, 500, 1000], rho=[0.3, 0.5, 0.8],
        beta=beta1(0.4, 0.6, 0.8, beta2=0.999, adam_beta2=0.999), momentum=[0.9, 0.95],
        grad_clip=[0.5, 1.0])),
    "adamw": dict(optimizer="adamw", space=dict(
        lr=(0.003, 0.05), decay=decays(0.02, 0.05, 0.1, 0.2), schedule=schedule,
        warmup_steps=warmup, betas=[(0.9, 0.95), (0.9, 0.99), (0.8, 0.95)])),
    "paper": dict(optimizer="sf_normuon", warmup_steps=100,  # its own β's, momentum and decay
                  space=dict(lr=(0.008, 0.25)), **few),
    "sf_adamw": dict(optimizer="sf_adamw", space=dict(
        lr=(0.004, 0.06), decay=decays(0.02, 0.05, 0.1), decay_at=["z", "y"], warmup_steps=warmup,
        betas=[(0.95, 0.99), (0.9, 0.99)]), **shorter),
    "schedulefree_plus": dict(optimizer="schedulefree_plus", grad_clip=0, space=dict(
        lr=(0.06, 0.5), warmup_steps=warmup, decay=decays(5.0, 20.0, 50.0), sf_beta=[0.5, 0.7, 0.9],
        averaging_start=[100, 200], polyak_beta=[0.0, 0.9]), **shorter),
    "muon": dict(optimizer="muon", space=dict(
        lr=(0.006, 0.1), decay=decays(0.0125, 0.025, 0.05, 0.1), schedule=schedule,
        warmup_steps=warmup, momentum=[0.9, 0.95], adam_betas=[(0.9, 0.95), (0.9, 0.99)]),
        **shorter),
}
