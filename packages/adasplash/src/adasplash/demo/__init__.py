"""The small language models behind `adasplash demo`, and how they were trained."""
