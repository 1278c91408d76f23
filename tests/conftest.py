"""What holds for all tests."""

from __future__ import annotations

import os

# A worker of pytest-xdist is given a terminal's size, which commands that a test has started would take for theirs.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
