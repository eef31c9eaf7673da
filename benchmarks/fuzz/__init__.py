"""Random inputs of the kinds that people have: `python -m benchmarks.fuzz folders|lists|checkpoints`."""
