# Schedule-free AdamW (arXiv:2405.15682) at 125M, without a horizon.
optimizer = "sf_adamw"
max_tokens = 20e9  # 8x
lr = 0.003
betas = 0.95, 0.99
