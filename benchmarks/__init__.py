"""Benchmarks: each prints ratios against peers interleaved in one run. Run as `python -m benchmarks.NAME`."""
