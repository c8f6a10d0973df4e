"""Options that several commands share."""

from pathlib import Path
from typing import Any

import click

FORMATS = ("fp32", "fp16", "bf16", "int8", "fp8", "nf4", "nf3")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_STORES = ("mmap", "disk", "pinned", "device")
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
OUTPUT = click.Path(path_type=Path, file_okay=False)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


def where_options(command: Any) -> Any:
    """Add the options that say where a model runs and where its table's rows are."""
    for option in (
        click.option(
            "--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True,
            help="Type of the weights; auto is that of the files.",
        ),
        DEVICE,
        click.option(
            "--cache", type=click.IntRange(min=0), default=0, show_default=True,
            help="Recently used rows to keep on the device.",
        ),
        click.option(
            "--store", type=click.Choice(_STORES), default="mmap", show_default=True,
            help="Where a table's rows are kept.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command
