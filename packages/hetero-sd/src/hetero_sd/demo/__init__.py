"""The main job on real input: SmolLM2-135M-Instruct drafted for by a small model of ours."""
