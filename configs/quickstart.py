# A small byte-level model of Python source code: a minute or two on two CPU cores. The method is
# the paper's; rate and warm-up are for this size.
data_dir = "data/stdlib"  # made from Python's standard library when it is missing
n_layer = 4
n_head = 4
n_embd = 64
block_size = 128
batch_size = 16  # 32 sequences a step, so that one process and two train it as it stands
total_batch_tokens = 32 * 128
max_tokens = 700 * 32 * 128
lr = 0.03
warmup_steps = 50
compile = False
eval_interval = 100
checkpoint_interval = 100
eval_tokens = 131072
