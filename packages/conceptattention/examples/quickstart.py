"""Generate a picture with the embedded model, map three words in it, and save the overlays."""

import torch

from conceptattention import ConceptAttention
from conceptattention.demo.model import load_pipeline

pipe = load_pipeline()  # any Flux.1 pipeline of diffusers works the same way
with ConceptAttention(pipe, concepts=["bee", "grass", "clouds"]) as observer:
    image = pipe(
        "a bee on grass under clouds",
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
maps = observer.heatmaps()
image.resize((512, 512)).save("image.png")
for word in maps.names():
    maps[word].overlay(image.resize((512, 512))).save(f"{word}.png")
print("wrote image.png,", ", ".join(f"{word}.png" for word in maps.names()))
