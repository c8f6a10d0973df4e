"""Check an installed wheel: public import, one tiny CPU call, the command line."""

import subprocess
import sys

import torch

from conceptattention import ConceptAttention, segment
from conceptattention.testing import tiny_flux

pipe = tiny_flux()
with ConceptAttention(pipe, ["cat", "grass"]) as observer:
    pipe("a cat on grass", height=16, width=16, num_inference_steps=1, max_sequence_length=16)
maps = observer.heatmaps().values
if maps.shape != (1, 2, 4, 4) or not torch.allclose(maps.sum(1), torch.ones(1, 4, 4)):
    sys.exit(f"unexpected maps: {maps.shape}")
maps = segment(pipe, torch.rand(1, 3, 16, 16), ["cat", "grass"]).values
if maps.shape != (1, 2, 4, 4):
    sys.exit(f"unexpected maps: {maps.shape}")
for arguments in (["--help"], ["env"], ["demo", "--help"]):
    command = [sys.executable, "-m", "conceptattention", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
