"""Looking into a running network: the signal at every connection, forward and backward."""

__all__: list[str] = []
