"""Two models with different vocabularies, both shipped with the package, on the CPU."""

from hetero_sd import HeteroSpeculativeDecoder, inspect_vocab
from hetero_sd.demo.models import load_model

target, target_tokenizer = load_model("target")
drafter, drafter_tokenizer = load_model("drafter")
print(inspect_vocab(target_tokenizer, drafter_tokenizer).to_markdown())

prompt = "<s>user\nWrite a short story about the sea.</s>\n<s>assistant\n"
for method in ("tli", "slem"):
    decoder = HeteroSpeculativeDecoder(
        target, drafter, target_tokenizer, drafter_tokenizer, method=method, lookahead=3
    )
    made = decoder.generate(prompt, max_new_tokens=32)
    print(f"\n{method}, {made.stats.block_efficiency:.2f} tokens a target pass\n{made.text}")
