# The recommended configuration (experiments/README.md) at 125M, where it has not been run.
# The rate is a guess, a quarter of the paper's as at 0.07M: sweep it. 1 / (lr * weight_decay) is
# the steps of 1x (20 tokens per parameter; 1.5 times as many at 0.07M) and the warm-up, from which
# beta_power counts, a seventh of them, as there. Nothing depends on max_tokens.
max_tokens = 20e9  # 8x
lr = 0.002
weight_decay = adam_weight_decay = 0.1
warmup_steps = 700
betas = 0.4, 0.95
adam_betas = 0.4, 0.99
momentum = 0.9
decay_at = "y"
averaging_power = 2.0
beta_power = 0.3
