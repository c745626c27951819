"""SFNorMuon in the Trainer of Hugging Face transformers, which calls optimizer.train() before each training step and
optimizer.eval() before each evaluation by itself, but not before it saves: that is what the callback is for.

    PYTHONPATH=. python examples/hf_trainer.py out/ 12     trains a tiny model for 12 steps; goes on from the last checkpoint in out/
"""
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sf_normuon import SFNorMuon


class SaveAveragedWeights(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, **kwargs):
        if control.should_save or control.should_training_stop:
            optimizer.eval()

    on_epoch_end = on_step_end


out, steps = sys.argv[1], int(sys.argv[2])
text = torch.tensor([*Path(__file__).read_bytes()]).unfold(0, 32, 16)
data = [{"input_ids": row, "labels": row} for row in text]

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2, max_position_embeddings=32))
matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]  # neither embeddings nor the output head
ids = {id(p) for p in matrices}
others = [p for p in model.parameters() if id(p) not in ids]
optimizer = SFNorMuon([{"params": matrices}, {"params": others, "use_muon": False}], lr=0.02, warmup_steps=4)

arguments = TrainingArguments(
    out, max_steps=steps, per_device_train_batch_size=8, lr_scheduler_type="constant",  # its default decays
    eval_strategy="steps", eval_steps=6, save_steps=4, report_to="none", use_cpu=not torch.cuda.is_available())
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], optimizers=(optimizer, None),
                  callbacks=[SaveAveragedWeights()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if Path(out).exists() else None)
print(trainer.evaluate()["eval_loss"])
