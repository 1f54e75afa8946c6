"""Writes 100 MB without a single line break, then says a word."""

import sys

for _ in range(100):
    sys.stdout.write("x" * (1 << 20))
sys.stdout.write("\nthe end\n")
