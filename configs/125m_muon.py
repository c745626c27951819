# torch's own Muon with a cosine schedule for one horizon at 125M, AdamW for embeddings and gains.
optimizer = "muon"
schedule = "cosine"
max_tokens = 2.5e9  # 1x
lr = 0.004
momentum = 0.95
adam_betas = 0.9, 0.95
