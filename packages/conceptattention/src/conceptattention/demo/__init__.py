"""The embedded demo: procedural scenes, a small Flux.1 model, its training and the main job."""
