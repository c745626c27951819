# AdamW with a cosine schedule for one horizon at 125M.
# 2x, 4x, 8x: --max_tokens=5e9, 10e9, 20e9, each with an --out_dir of its own.
optimizer = "adamw"
schedule = "cosine"
max_tokens = 2.5e9  # 1x
lr = 0.0015
betas = 0.9, 0.95
weight_decay = 0.1
adam_weight_decay = 0.1
