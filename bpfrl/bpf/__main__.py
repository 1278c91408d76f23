"""``python -P -m bpfrl.bpf``: compile this installation's programs into it.

For images and packages that are to do without a compiler. An installation whose sources change afterwards compiles
again. Without -P, Python would take the bpfrl of the folder that it is called in, if there is one.
"""

from __future__ import annotations

import sys

from bpfrl.bpf import generator
from bpfrl.errors import BpfrlError

try:
    for source, path in generator.ship().items():
        sys.stdout.write(f"{source} {path}\n")
except (BpfrlError, OSError) as error:
    sys.exit(f"bpfrl: {error}")
