"""Checkpoints: folders of safetensors files with a manifest of hashes, written so that no crash loses the last one."""

__all__: list[str] = []
