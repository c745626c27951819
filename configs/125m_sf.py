# SF-NorMuon at 125M: the defaults of train.py, which are the paper's where it gives them.
# Nothing depends on max_tokens: stop whenever you like, or go on with a larger one.
max_tokens = 20e9  # 8x, where 1x is 20 tokens per parameter
