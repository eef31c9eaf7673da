"""The race against timm, torchvision and transformers: contenders, devices, ceilings, journal, tables and chart."""

__all__: list[str] = []
