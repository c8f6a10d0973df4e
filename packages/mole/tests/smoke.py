"""Smoke test of the installed wheel: public import, one tiny run on the CPU, the command."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mole

torch.manual_seed(0)
config = mole.MoleConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = mole.MoleForCausalLM(config).eval()
ids = torch.arange(8)[None]
with tempfile.TemporaryDirectory() as folder:
    mole.convert(model, folder, "fp32", progress=False)
    table = mole.MoleForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        gap = (table(ids).logits - model(ids).logits).abs().max().item()
    table.lut.close()
if gap > 1e-5:
    raise SystemExit(f"the table's logits differ from the experts' by {gap}")

shipped = Path(mole.__file__).parent / "demo" / "assets"
for name in ("mole/model.safetensors", "dense/model.safetensors", "tokenizer/tokenizer.json",
             "snippet.txt", "training.json", "training_log.csv"):  # fmt: skip
    if not (shipped / name).is_file():
        raise SystemExit(f"the wheel lacks mole/demo/assets/{name}")
for command in (["--help"], ["generate", "Alice was", "--new-tokens", "4"]):
    script = Path(sys.executable).with_name("mole")
    subprocess.run([script, *command], check=True, stdout=subprocess.DEVNULL)
