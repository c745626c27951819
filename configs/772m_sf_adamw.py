# Schedule-free AdamW (arXiv:2405.15682) at 772M, without a horizon.
n_layer = 36
n_head = 20
n_embd = 1280
total_batch_tokens = 1_048_576
optimizer = "sf_adamw"
max_tokens = 123e9  # 8x
lr = 0.0015
betas = 0.95, 0.99
