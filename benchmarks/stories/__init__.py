"""Published stories of failed training, rebuilt small: the diagnosis names the cause, and the mended network trains."""
