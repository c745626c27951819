# AMUSE (arXiv:2605.22432) at 125M, with its authors' values for 124M.
# Their warm-up is 6000 of 16000 steps; in proportion it is 14300 of the 38146 of 8x.
optimizer = "amuse"
max_tokens = 20e9  # 8x
lr = 0.01
betas = 0.6, 0.999
adam_betas = 0.6, 0.999
momentum = 0.95
warmup_steps = 6000
grad_clip = 0.5
