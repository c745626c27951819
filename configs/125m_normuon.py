# NorMuon (arXiv:2510.05491) with a cosine schedule for one horizon at 125M.
# The other schedules: --schedule=linear, --schedule=wsd.
optimizer = "normuon"
schedule = "cosine"
max_tokens = 2.5e9  # 1x
lr = 0.004
betas = 0.9, 0.95
momentum = 0.95
adam_betas = 0.9, 0.95
