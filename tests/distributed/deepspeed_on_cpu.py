"""train.py under a DeepSpeed strategy on the CPU, which neither train.py nor Lightning accepts:

    python deepspeed_on_cpu.py STRATEGY FLAGS_OF_TRAIN...
"""

import importlib
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import pytorch_lightning.strategies.deepspeed as lightning

from src.cli.run import run
from src.cli.train import parse
from src.training.run import train
from tests.settings import changed


def main(arguments) -> None:
    strategy, *flags = arguments
    base, initialize = lightning.DeepSpeedStrategy, deepspeed.initialize

    def on_cpu(args, **named):
        args.device_rank = 0  # Lightning gives the CUDA device's number
        return initialize(args=args, **named)

    base.setup_environment = lambda self: super(base, self).setup_environment()
    lightning._validate_device_index_selection = lambda devices: None
    deepspeed.initialize = on_cpu
    # Gloo does without it. It would be compiled in torch's cache, where a build that was killed blocks all later ones.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    config, expected, _ = parse(flags)
    train(changed(config, strategy=strategy), expected)


if __name__ == "__main__":
    run(main)
