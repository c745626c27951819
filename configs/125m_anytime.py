# The recommended configuration (experiments/README.md) at 125M, where it has not been run.
# One rate for every width: about 0.02 was best at widths 64, 128 and 256, of which 768 is three
# times the largest (experiments/studies/width.py). 1 / (lr * weight_decay) is the steps of 1x, and
# the warm-up, from which beta_power counts, a seventh of them. Nothing depends on max_tokens.
max_tokens = 20e9  # 8x
_steps = 4716  # of 1x, 20 tokens per parameter
step_norm = "spectral"
lr = 0.02
weight_decay = adam_weight_decay = 1 / (lr * _steps)
warmup_steps = _steps // 7
betas = 0.4, 0.95
adam_betas = 0.4, 0.99
momentum = 0.9
decay_at = "y"
averaging_power = 2.0
beta_power = 0.3
