"""SFNorMuon in the Trainer of Hugging Face transformers.

    PYTHONPATH=. python examples/hf_trainer.py out/ 12

trains a tiny model for 12 steps, and goes on from the last checkpoint in out/. The Trainer calls
optimizer.train() before each training step and optimizer.eval() before each evaluation. It does not
before it saves: the callback does. Give it the optimizer itself: from a class and its arguments
(optimizer_cls_and_kwargs) it makes groups that put hidden matrices and embeddings together.
"""
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sf_normuon import SFNorMuon, param_groups


class SaveAveragedWeights(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if control.should_save or control.should_training_stop:
            optimizer.eval()

    on_epoch_end = on_step_end


out, steps = sys.argv[1], int(sys.argv[2])
text = torch.tensor([*Path(__file__).read_bytes()]).unfold(0, 32, 16)
data = [{"input_ids": row, "labels": row} for row in text]

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=32))
optimizer = SFNorMuon(param_groups(model), lr=0.02, warmup_steps=4)

arguments = TrainingArguments(
    out, max_steps=steps, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=6,
    lr_scheduler_type="constant",  # the default decays, which needs a horizon
    save_steps=4, report_to="none", use_cpu=not torch.cuda.is_available())
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8],
                  optimizers=(optimizer, None), callbacks=[SaveAveragedWeights()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if Path(out).exists() else None)
print(trainer.evaluate()["eval_loss"])
