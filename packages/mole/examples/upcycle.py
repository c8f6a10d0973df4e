"""Give a Llama-type model lookup experts, train them, and serve them from a table.

Runs on a CPU in a few seconds with a small random model. With a model of your own and text:

    python examples/upcycle.py --base FOLDER --text books.txt --steps 500

`--base` is a folder that transformers loads; `--gguf NAME` names a GGUF file in it. The new model
has exactly the base's loss until it is trained; the control is the base itself, trained on with
the same text in the same order. With `--freeze` all that is learned is in the table.
"""

import copy
import tempfile
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mole
from mole.evaluation import window_losses
from mole.training import TrainSettings, load_tokens, train
from mole.upcycling import load_base


def toy() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Return a small random Llama and text that a bigram model would know."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    follows = torch.randint(0, 64, (64, 2))
    text = [0]
    for choice in torch.randint(0, 2, (8000,)).tolist():
        text.append(int(follows[text[-1], choice]))
    return base, torch.tensor(text, dtype=torch.int32)


@click.command()
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="Folder of a model.")
@click.option("--gguf", help="GGUF file in that folder.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text to train on.")
@click.option("--experts", default=2, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--freeze", is_flag=True, help="Train routers and experts only.")
def main(
    base: Path | None,
    gguf: str | None,
    text: Path | None,
    experts: int,
    steps: int,
    lr: float,
    freeze: bool,
) -> None:
    """Upcycle, train, convert, and compare with the base trained on."""
    if base is None:
        model, tokens = toy()
    else:
        model = load_base(base, gguf)
        words = AutoTokenizer.from_pretrained(base, **({"gguf_file": gguf} if gguf else {}))
        tokens = load_tokens([text], model.config.vocab_size, words)
    context = min(256, model.config.max_position_embeddings)
    held_out = len(tokens) // 10
    valid, rest = tokens[:held_out], tokens[held_out:]
    half = list(range(0, model.config.num_hidden_layers, 2))  # experts in every other layer
    control = copy.deepcopy(model.eval())
    grown = mole.upcycle(model, experts, layers=half, freeze_backbone=freeze)
    grown.config.dedup = "micro"
    loss = {"base": window_losses(control, valid, context).mean().item()}
    loss["with experts, untrained"] = window_losses(grown.eval(), valid, context).mean().item()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(steps=steps, batch=8, micro_batch=4, context=context, lr=lr)
        train(control, rest, Path(folder) / "control", settings)
        loss["base, trained on"] = window_losses(control.eval(), valid, context).mean().item()
        train(grown, rest, Path(folder) / "trained", settings)
        loss["with experts, trained"] = window_losses(grown.eval(), valid, context).mean().item()
        table = mole.convert(grown, Path(folder) / "table", "nf4")
        served = mole.MoleForCausalLM.from_pretrained(table).eval()
        loss["from an nf4 table"] = window_losses(served, valid, context).mean().item()
        served.lut.close()
    for name, nats in loss.items():
        click.echo(f"{name}: {nats:.3f} nats per token")


if __name__ == "__main__":
    main()
