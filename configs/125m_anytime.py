# The frontier's configuration (experiments/results/frontier.md), which at 0.07M parameters is level with NorMuon under a
# schedule tuned for the length, at 125M, where it has not been run. The rate is a guess, a quarter of the paper's, as at
# 0.07M (an eighth at 0.2M): sweep it. The warm-up, from which beta_power counts, is a seventh of 1x, as there. Nothing
# depends on max_tokens.
max_tokens = 20e9  # 8x, where 1x is 20 tokens per parameter
lr = 0.002
warmup_steps = 700
betas = 0.4, 0.95
adam_betas = 0.4, 0.99
momentum = 0.9
decay_at = "y"
weight_decay = adam_weight_decay = 0.03
averaging_power = 2.0
beta_power = 0.5
