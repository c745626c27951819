"""The comparison at 0.07M parameters, on the bytes of the Linux kernel's C files
(experiments/corpora.py says how to get them): every optimizer's rate tuned with the same grid, on a
seed that is not reported. Some hours on two CPU cores.
"""
base = dict(
    data_dir="data/linux", vocab_size=320, n_layer=2, n_head=3, n_embd=48,  # 70,896 parameters
    block_size=128, batch_size=16, total_batch_tokens=2048, warmup_steps=100,
    eval_interval=173, eval_tokens=262144, log_interval=173,
    device="cpu", dtype="float32", compile=False)
tokens = 692 * 2048  # 1x: 20 for each parameter
horizons = 1, 2, 4
seeds = 0, 1, 2  # reported
tuning_seeds = 100,

# A list of rates is a grid, which grows until its best one is inside. Everything else is the
# authors' or common practice.
adamw = dict(optimizer="adamw", betas=(0.9, 0.95), weight_decay=0.1, adam_weight_decay=0.1,
             lr=[0.004, 0.008, 0.016])
normuon = dict(optimizer="normuon", momentum=0.95, adam_betas=(0.9, 0.95),
               lr=[0.008, 0.016, 0.032])
sf_normuon = dict(optimizer="sf_normuon", lr=[0.016, 0.032, 0.064])
one = dict(seeds=(0,))  # carries no claim

optimizers = {
    "adamw_cosine": dict(adamw, schedule="cosine"),
    "sf_normuon": sf_normuon,
    "sf_adamw": dict(optimizer="sf_adamw", betas=(0.95, 0.99), lr=[0.008, 0.016, 0.032]),
    "normuon_linear": dict(normuon, schedule="linear"),
    "sf_normuon_paper": dict(sf_normuon, lr=0.008),  # the paper's own rate
    "amuse": dict(optimizer="amuse", betas=(0.6, 0.999), adam_betas=(0.6, 0.999), momentum=0.95,
                  grad_clip=0.5, lr=[0.01, 0.02, 0.04], **one),
    "schedulefree_plus": dict(optimizer="schedulefree_plus", betas=(0.9, 0.95),
                              weight_decay=20, adam_weight_decay=20, grad_clip=0,
                              averaging_start=200, polyak_beta=0.9, lr=[0.0625, 0.125, 0.25],
                              **one),
    "muon_cosine": dict(normuon, optimizer="muon", schedule="cosine", **one),
    "normuon_cosine": dict(normuon, schedule="cosine", **one),
    "normuon_wsd": dict(normuon, schedule="wsd", **one),
    "adamw_wsd": dict(adamw, schedule="wsd", **one),
}

headline = {"sf_normuon": "SF-NorMuon, the paper's", "normuon_linear": "NorMuon, linear",
            "adamw_cosine": "AdamW, cosine", "muon_cosine": "Muon, cosine", "sf_adamw": "SF-AdamW",
            "amuse": "AMUSE, T0 = 100", "schedulefree_plus": "ScheduleFree+"}
