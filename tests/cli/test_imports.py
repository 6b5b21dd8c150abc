"""A wrong flag is refused, and --help printed, before anything heavy is imported."""

import subprocess
import sys

PROGRAM = """
import sys
from src.cli import evaluate, generate, merge, prepare, train
for script in (evaluate, generate, merge, prepare, train):
    script.parser()
print([name for name in sys.modules if name in ("src.model", "pytorch_lightning", "torch._dynamo", "transformers", "pandas")])
"""


def test_parsers_need_no_model_and_no_lightning():
    assert subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout == "[]\n"
