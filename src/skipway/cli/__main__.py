"""`python -m skipway.cli`, for where the `skipway` command is not on the path."""

from __future__ import annotations

import sys

from skipway.cli import main

sys.exit(main())
