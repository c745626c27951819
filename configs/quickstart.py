# A small byte-level model of Python source code, in under three minutes on two CPU cores.
data_dir = "data/stdlib"  # made from the Python standard library's own source files when it is missing
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 4
total_batch_tokens = 24 * 256
max_tokens = 600 * 24 * 256
lr = 0.02
warmup_steps = 100
compile = False
eval_interval = 100
checkpoint_interval = 100
eval_tokens = 65536
