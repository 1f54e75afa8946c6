"""Draws a bar with carriage returns, as tqdm does, with colours and an invalid byte, and never ends the line."""

import sys

for n in range(33):
    bar = "#" * n + " " * (32 - n)
    sys.stdout.buffer.write(
        f"\r\x1b[32mtrain: {n * 100 // 32:3d}%|{bar}| {n}/32 [00:01<00:02, 3.1it/s]\x1b[0m".encode()
    )
    sys.stdout.buffer.write(b"\xff")
    sys.stdout.flush()
