# ScheduleFree+ (arXiv:2605.19095) at 125M: no rate, lr multiplies Polyak's step.
optimizer = "schedulefree_plus"
max_tokens = 20e9  # 8x
lr = 1.0
betas = 0.9, 0.95
weight_decay = 20.0  # times the square of the step, so far larger than elsewhere
adam_weight_decay = 20.0
averaging_start = 4000  # twice the warm-up
polyak_beta = 0.9
grad_clip = 0  # clipping would make the step longer
