# AdamW with a cosine schedule for one horizon at 772M.
n_layer = 36
n_head = 20
n_embd = 1280
total_batch_tokens = 1_048_576
optimizer = "adamw"
schedule = "cosine"
max_tokens = 15.4e9  # 1x
lr = 0.0006
betas = 0.9, 0.95
weight_decay = 0.1
adam_weight_decay = 0.1
