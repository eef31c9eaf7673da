"""`python -m skipway`, and `torchrun -m skipway` for several processes."""

from __future__ import annotations

import sys

from skipway.cli import main

__all__: list[str] = []

sys.exit(main())
