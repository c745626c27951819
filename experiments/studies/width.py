"""How the best rate moves with the width, and around width 64 with depth, batch and length: 1,000
steps of 4,096 tokens, depth 4, heads of 16. Matrix steps of a given RMS (the paper's) beside steps
of a given spectral norm, both with a rate of 0.02 for embeddings and gains (apart); the paper's
method, NorMuon and AdamW with one rate for all parameters.

Runs that choose a rate are named tune_; those of adam_ change only that of embeddings and gains.
Decay times rate stays one over 1,000 steps (the paper's method keeps its decay of 0.05). rule_ is
what came out, to 4,000 steps, at width 128 (1x) and 64 (4x): one rate for everything, decay and
warm-up by the steps of 1x, 20 tokens per parameter.
Validation is of 1M bytes: on 262,144, which the first 26 runs used, the noise is twice as large.
Their models were read again from the checkpoints. Seed 2 of anytime_apart_64 and a few rates beyond
the grids stem from that time. Given up after two runs each, given_up_ in the log: the recommended
configuration with one rate and steps of RMS, and the paper's method with spectral steps.
"""
base = dict(
    data_dir="data/linux", vocab_size=320, n_layer=4, block_size=32, batch_size=128,
    total_batch_tokens=4096, eval_interval=1000, eval_tokens=1048576, log_interval=100,
    device="cpu", dtype="float32", compile=True, warmup_steps=100)
tokens, horizons = 1000 * 4096, (1,)
seeds, tuning_seeds = (), (0, 1)


def decay(lr):  # times the rate is 0.001
    return 0.001 / lr


coupled = dict(weight_decay=decay, adam_weight_decay=decay)
rms_rates, spectral_rates = [0.008, 0.016], [0.0125, 0.025]
apart = dict(adam_lr=0.02, weight_decay=decay, adam_weight_decay=0.05)
anytime = dict(optimizer="sf_normuon", decay_at="y", betas=(0.4, 0.95), adam_betas=(0.4, 0.99),
               momentum=0.9, averaging_power=2.0, beta_power=0.3)
normuon = dict(optimizer="normuon", schedule="linear", momentum=0.95, adam_betas=(0.9, 0.95))
center = dict(n_embd=64, n_layer=4, total_batch_tokens=4096, steps=1000)
law_from = dict(n_embd=64, n_layer=4)  # chosen after the runs: 32, and 2 layers, lie far above
predict = dict(n_embd=(768, 1280))
methods = {
    "anytime_apart": dict(anytime, **apart, lr=rms_rates),
    "anytime_spectral": dict(anytime, **apart, step_norm="spectral", lr=spectral_rates),
    "paper": dict(optimizer="sf_normuon", lr=[0.064, 0.128]),
    "normuon": dict(normuon, **coupled, lr=rms_rates),
    "adamw": dict(optimizer="adamw", schedule="linear", betas=(0.9, 0.95), **coupled, lr=rms_rates),
}
optimizers = {f"{name}_{width}": dict(knobs, n_embd=width, n_head=width // 16)
              for name, knobs in methods.items() for width in (32, 64, 128)}
for name, lr in (("anytime_apart", [0.004, 0.008]), ("anytime_spectral", spectral_rates),
                 ("paper", [0.016, 0.032]), ("normuon", [0.004, 0.008]), ("adamw", [0.004, 0.008])):
    optimizers[f"{name}_256"] = dict(methods[name], n_embd=256, n_head=16, lr=lr)

around = {  # one thing changes at width 64
    "layers2": dict(n_layer=2), "layers8": dict(n_layer=8), "length4": dict(horizons=(4,)),
    "steps1000_batch1024": dict(total_batch_tokens=1024, batch_size=32, horizons=(0.25,)),
    "steps1000_batch16384": dict(total_batch_tokens=16384, horizons=(4,), lr=rms_rates),
    # the same tokens: what is counted in steps changes too
    "batch1024": dict(total_batch_tokens=1024, batch_size=32, eval_interval=4000, warmup_steps=400,
                      weight_decay=lambda lr: decay(lr) / 4, adam_weight_decay=0.0125),
    "batch16384": dict(total_batch_tokens=16384, eval_interval=250, warmup_steps=25,
                       weight_decay=lambda lr: decay(lr) * 4, adam_weight_decay=0.2),
}
optimizers |= {f"anytime_apart_{name}": {**optimizers["anytime_apart_64"], "lr": [0.004, 0.008],
                                         **knobs} for name, knobs in around.items()}
for width, lr in ((32, 0.032), (64, 0.008), (128, 0.008)):
    for adam_lr in (0.005, 0.01, 0.04):
        optimizers[f"adam_{adam_lr}_{width}"] = dict(
            methods["anytime_apart"], n_embd=width, n_head=width // 16, lr=lr, adam_lr=adam_lr,
            adam_weight_decay=decay(adam_lr), seeds=(10,))

for width, steps, rates in ((128, 4000, (0.01, 0.02, 0.04)), (64, 1000, (0.02,))):  # of 1x
    for lr in rates:
        optimizers[f"rule_{lr}_{width}"] = dict(
            anytime, step_norm="spectral", n_embd=width, n_head=width // 16, lr=lr,
            weight_decay=1 / (lr * steps), adam_weight_decay=1 / (lr * steps),
            warmup_steps=steps // 7, horizons=(4,), seeds=(10, 11) if lr == 0.02 else (10,))
    optimizers[f"rule_warmup{steps // 40}_{width}"] = dict(
        optimizers[f"rule_0.02_{width}"], warmup_steps=steps // 40)
