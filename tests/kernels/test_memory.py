"""Recycled memory of CPU tensors, in a process of its own, since it stays for good."""

import subprocess
import sys
from pathlib import Path

from tests.compiled import compiled

pytestmark = compiled
ROOT = Path(__file__).resolve().parents[2]

BEGIN = """
import random, resource, sys, torch
from src.kernels import recycle_memory
before = torch.ones(1 << 20)
recycle_memory()
"""

CONTENTS = """
draw, held = random.Random(0), []
for number in range(2000):
    if held and draw.random() < 0.5:
        value, x = held.pop(draw.randrange(len(held)))
        assert bool((x == value).all())
    else:
        x = torch.full((draw.choice([0, 3, 1 << 18, draw.randrange(1 << 21)]),), float(number))
        assert x.data_ptr() % 64 == 0
        held.append((float(number), x))
assert all(bool((x == value).all()) for value, x in held) and bool((before == 1).all())
x = torch.zeros(1 << 20)
x.resize_(1 << 22)
assert bool((x[:1 << 20] == 0).all()) and x.clone().share_memory_().is_shared()
"""

REUSE = """
x = torch.ones(1 << 20)
first = x.data_ptr()
del x
x = torch.ones((1 << 20) - 999)
assert x.data_ptr() == first
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in range(1 << 20, 1 << 24, 1 << 16):  # 240 sizes, 8.6 GB in all, none held
    torch.ones(size)
# The largest tensor is 64 MB, and 64 MB may be idle beside it. Linux counts in kilobytes, others otherwise.
kept = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
assert sys.platform != "linux" or kept < 64 + 64 + 16, f"{kept} MB"
"""

# Matrix products, some of which take scratch memory, small or large, that is no tensor's.
PRODUCTS = """
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for rows in (1, 60, 4000):
        for columns in (64, 4096):
            left, right = torch.ones(5, rows, 512, dtype=dtype), torch.ones(columns, 512, dtype=dtype)
            assert bool((torch.nn.functional.linear(left[0], right) == 512).all())
            assert bool((left @ right[:64].T.expand(5, 512, 64) == 512).all())
"""


def test_tensors_keep_their_contents_products_find_scratch_memory_and_freed_memory_is_used_again():
    """The last comes first, while the process's largest size is still its own."""
    done = subprocess.run([sys.executable, "-c", BEGIN + REUSE + CONTENTS + PRODUCTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
