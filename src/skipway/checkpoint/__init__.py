"""Checkpoints: folders of safetensors files with a manifest of hashes, safe against crashes."""

__all__: list[str] = []
