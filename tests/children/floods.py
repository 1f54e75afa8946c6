"""Writes 20 MB of short lines as fast as it can."""

import sys

for _ in range(200):
    sys.stdout.write("all work and no play\n" * 5_000)
