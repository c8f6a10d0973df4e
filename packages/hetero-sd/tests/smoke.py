"""Checks an installed wheel: public import, one tiny call, the command's help."""

import subprocess
import sys

import torch

import hetero_sd
from hetero_sd.demo.models import load_model

target, target_tokenizer = load_model("target")
drafter, drafter_tokenizer = load_model("drafter")
decoder = hetero_sd.HeteroSpeculativeDecoder(
    target, drafter, target_tokenizer, drafter_tokenizer, method="tli", lookahead=3
)
prompt = "<s>user\nWhat is bread?</s>\n<s>assistant\n"
made = decoder.generate(prompt, max_new_tokens=6)
ids = target_tokenizer(prompt, return_tensors="pt").input_ids
with torch.no_grad():
    alone = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
if made.sequences.tolist() != alone.tolist():
    sys.exit("greedy output differs from the target's own")
help_text = subprocess.run(
    [sys.executable, "-m", "hetero_sd", "--help"], check=True, capture_output=True, text=True
).stdout
if "demo" not in help_text:
    sys.exit("the command's help does not name `demo`")
sys.stdout.write(f"hetero-sd {hetero_sd.__version__}: ok\n")
