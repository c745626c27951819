# SF-NorMuon at 772M. Nothing depends on max_tokens: stop at any time, or go on with a larger one.
n_layer = 36
n_head = 20
n_embd = 1280
total_batch_tokens = 1_048_576
max_tokens = 123e9  # 8x, where 1x is 20 tokens per parameter
