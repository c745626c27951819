"""How the best rate moves with the width: 1,000 steps of 4,096 tokens for widths 32, 64 and 128 at
depth 4 with heads of 16, steps of a given RMS (the paper's) beside steps of a given spectral norm.

All runs choose a rate, so all are named tune_. Decay times rate stays 1/1000 (the paper's method
keeps its decay of 0.05). With spectral steps, embeddings and gains keep a rate of their own.
"""
base = dict(
    data_dir="data/linux", vocab_size=320, n_layer=4, block_size=32, batch_size=128,
    total_batch_tokens=4096, eval_interval=1000, eval_tokens=262144, log_interval=100,
    device="cpu", dtype="float32", compile=True, warmup_steps=100)
tokens, horizons = 1000 * 4096, (1,)
seeds, tuning_seeds = (), (0, 1)


def per_step(lr):  # of the weights are lost
    return 0.001 / lr


coupled = dict(weight_decay=per_step, adam_weight_decay=per_step)
rms, wide = [0.008, 0.016, 0.032], [0.0125, 0.025, 0.05]
apart = dict(step_norm="spectral", adam_lr=0.02, weight_decay=per_step, adam_weight_decay=0.05)
anytime = dict(optimizer="sf_normuon", decay_at="y", betas=(0.4, 0.95), adam_betas=(0.4, 0.99),
               momentum=0.9, averaging_power=2.0, beta_power=0.3)
normuon = dict(optimizer="normuon", schedule="linear", momentum=0.95, adam_betas=(0.9, 0.95))
follow, predict = "n_embd", (768, 1280)
methods = {
    "anytime": dict(anytime, **coupled, lr=rms),
    "anytime_spectral": dict(anytime, **apart, lr=wide),
    "paper": dict(optimizer="sf_normuon", lr=[0.064, 0.128, 0.256]),
    "paper_spectral": dict(optimizer="sf_normuon", step_norm="spectral", adam_lr=0.1,
                           lr=[0.1, 0.2, 0.4]),
    "normuon": dict(normuon, **coupled, lr=rms),
    "normuon_spectral": dict(normuon, **apart, lr=wide),
    "adamw": dict(optimizer="adamw", schedule="linear", betas=(0.9, 0.95), **coupled,
                  lr=[0.004, 0.008, 0.016]),
}
optimizers = {f"{name}_{width}": dict(knobs, n_embd=width, n_head=width // 16)
              for name, knobs in methods.items() for width in (32, 64, 128)}
