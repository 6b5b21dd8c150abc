"""What a run takes from its environment variables: who started its processes, and which one this is. Nothing else."""

import os
import socket
from collections.abc import Callable

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities import rank_zero_only

from src.errors import UserError
from src.training.config import TrainConfig
from src.training.following import is_follower

# Variables that Lightning uses in place of missing arguments; they would change a run behind its flags.
SETTINGS = ("PL_TRAINER_", "PL_DEEPSPEED_CONFIG_PATH")


class First(LightningEnvironment):
    """That of the first process, alone or with others that it starts itself; no variable changes it."""

    main_address = "127.0.0.1"

    @property
    def creates_processes_externally(self) -> bool:
        return True  # so that Lightning starts none

    @property
    def main_port(self) -> int:
        """A port that was free at the first access."""
        if self._main_port == -1:
            with socket.socket() as listener:
                listener.bind((self.main_address, 0))
                self._main_port = listener.getsockname()[1]
        return self._main_port

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0


def environment_of(config: TrainConfig) -> ClusterEnvironment:
    """This process's place among those of its run; given to Lightning, which would otherwise guess it.

    Raises UserError if a launcher started another number of processes than `--devices`, or its variables are incomplete.
    """
    launcher, kind = _launcher(config.machine.devices)
    try:
        found = kind()
        found.validate_settings(num_devices=config.machine.devices, num_nodes=1)
        by_hand = isinstance(found, LightningEnvironment)
        rank = found.local_rank() if by_hand else found.global_rank()
        size = config.machine.devices if by_hand else found.world_size()
        if size != config.machine.devices or not (0 <= rank < size and 0 <= found.local_rank() < size and found.main_port):
            raise ValueError(f"this is process {rank} of {size}")
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise UserError(f"--devices {config.machine.devices}: {launcher} should have started a process for each device, but "
                        f"{reason}; correct that, or unset its variables") from None
    found.set_global_rank(rank)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # most environments leave Lightning's guess there
    return found


def _launcher(devices: int) -> tuple[str, Callable[[], ClusterEnvironment]]:
    """Who started this process as one of several: in words, and as Lightning's class."""
    if is_follower():
        return "the first process", LightningEnvironment
    if TorchElasticEnvironment.detect():
        return "torchrun", TorchElasticEnvironment
    if devices > 1:
        # A batch script has SLURM's variables too, but only srun starts a step, and a step of one task is one process.
        if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS") != "1" and SLURMEnvironment.detect():
            return "srun", SLURMEnvironment
        if LSFEnvironment.detect():
            return "jsrun", LSFEnvironment
        if MPIEnvironment.detect():
            return "MPI", MPIEnvironment
        if {"LOCAL_RANK", "MASTER_PORT"} <= os.environ.keys():  # without a common port the processes would never meet
            return "whatever set LOCAL_RANK", LightningEnvironment
    return "nobody", First


def ignore_settings() -> tuple[str, ...]:
    """Remove Lightning's settings from the environment; returns a line that names them, if there were any."""
    names = sorted(name for name in os.environ if name.startswith(SETTINGS))
    for name in names:
        del os.environ[name]
    return (f"note: no effect: {', '.join(names)} (only flags configure a run)",) if names else ()
