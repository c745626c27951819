# AMUSE (arXiv:2605.22432) at 125M, with its authors' values for 124M but for T0, the warm-up: their
# 6000 of 16000 steps are in proportion 14300 of the 38146 of 8x.
optimizer = "amuse"
max_tokens = 20e9  # 8x
lr = 0.01
betas = 0.6, 0.999
adam_betas = 0.6, 0.999
momentum = 0.95
warmup_steps = 14300
grad_clip = 0.5
