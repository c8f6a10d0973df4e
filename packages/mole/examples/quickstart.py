"""Train a tiny lookup-expert model, convert it to a table, and compare the two forms.

Runs on a CPU in a few seconds: `python examples/quickstart.py`.
"""

import tempfile

import torch

import mole

torch.manual_seed(0)
config = mole.MoleConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_lookup_experts=4,
    dedup="micro",  # run the experts once for every distinct id of a batch
)
model = mole.MoleForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
ids = torch.randint(0, 64, (4, 32))
for _ in range(100):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"training loss {loss.item():.3f} nats per token")

model.eval()
with tempfile.TemporaryDirectory() as folder:
    mole.convert(model, folder, fmt="fp16")
    table = mole.MoleForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        gap = (table(ids).logits - model(ids).logits).abs().max().item()
    print(f"{table.lut.meta.row_bytes} bytes are read per token; logits differ by {gap:.1e}")
    print(table.generate(ids[:1, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)[0])
    table.lut.close()
