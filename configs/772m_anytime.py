# The recommended configuration at 772M, where it has not been run: as 125m_anytime.py, which gives
# the reasons. The rate is the same; decay and warm-up count the steps of 1x here.
n_layer = 36
n_head = 20
n_embd = 1280
total_batch_tokens = 1_048_576
max_tokens = 123e9  # 8x
_steps = 14728  # of 1x, 20 tokens per parameter
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
