"""What the variables of launchers and of Lightning do to a run: nothing, unless a launcher started its processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities import rank_zero_only

from src.errors import UserError
from src.training.environment import First, environment_of, ignore_settings
from src.training.following import command_to_follow
from src.training.processes import starts_others
from src.training.run import train
from tests.settings import changed
from tests.training.outside import lines

ROOT = Path(__file__).parents[2]
HUNG = 900.0  # seconds after which a run will not end any more, however busy the machine
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
         "SLURM_NNODES": "1", "SLURM_JOB_ID": "1234567"}
# A step of two processes, whatever their nodes.
STEP = {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"} | {"SLURM_STEP_ID": "0"}
LSF = {"JSM_NAMESPACE_RANK": "0", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "0", "LSB_JOBID": "1",
       "LSB_DJOB_RANKFILE": "/nope"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500"}
BY_HAND = {"LOCAL_RANK": "1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables", [SLURM, {"SLURM_NTASKS": "2"}, {"SLURM_NTASKS": "x"}, LSF, BY_HAND, {"RANK": "1"},
                                       SLURM | {"SLURM_STEP_ID": "0"}])
def test_one_device_is_one_process_whatever_the_variables_say(config, given, variables):
    given(variables | {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x", "NODE_RANK": "5"})
    rank_zero_only.rank = 1  # as Lightning guesses from them
    found = environment_of(config())
    assert isinstance(found, First) and found.global_rank() == rank_zero_only.rank == found.local_rank() == found.node_rank() == 0
    assert found.main_address == "127.0.0.1" and 1024 <= found.main_port == found.main_port < 2**16
    assert found.creates_processes_externally  # or Lightning would start some
    assert not starts_others(config(), found)


@pytest.mark.parametrize("variables", [{}, {"SLURM_NTASKS": "2"}, {"SLURM_NTASKS": "x"}, SLURM, {"LOCAL_RANK": "0"},
                                       {"RANK": "1"}, SLURM | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"},
                                       SLURM | {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}])
def test_where_no_launcher_started_several_the_first_starts_the_others(config, given, variables):
    given(variables)
    found = environment_of(config(devices=2))
    assert starts_others(config(devices=2), found) and rank_zero_only.rank == 0


@pytest.mark.parametrize(("variables", "kind"), [(SLURM | {"SLURM_STEP_ID": "0"}, SLURMEnvironment),
                                                 (TORCHRUN, TorchElasticEnvironment), (BY_HAND, LightningEnvironment),
                                                 (TORCHRUN | SLURM, TorchElasticEnvironment)])
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_did_this_process_is_one_of_them(config, given, variables, kind, rank):
    places = ("SLURM_PROCID", "SLURM_LOCALID", "RANK", "LOCAL_RANK")
    given({name: str(rank) if name in places else value for name, value in variables.items()})
    found = environment_of(config(devices=2))
    assert type(found) is kind and found.global_rank() == found.local_rank() == rank_zero_only.rank == rank
    assert not starts_others(config(devices=2), found)


class Communicator:
    """MPI's, of two processes, of which this is the second."""

    Get_size, Get_rank = (lambda self: 2), (lambda self: 1)

    def bcast(self, value, root: int):
        return value

    def gather(self, value, root: int):
        return [value, value]

    def Split(self, color: int) -> "Communicator":
        return self


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_one_of_two_processes_of_mpi(config, given, monkeypatch, devices):
    given({})
    monkeypatch.setattr("lightning_fabric.plugins.environments.mpi._MPI4PY_AVAILABLE", True)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=Communicator())))
    if devices == 3:
        with pytest.raises(UserError, match="--devices 3: MPI should have started"):
            environment_of(config(devices=devices))
    else:
        found = environment_of(config(devices=devices))
        assert type(found) is (MPIEnvironment if devices == 2 else First) and found.global_rank() == devices - 1


@pytest.mark.parametrize("left_over", [{}, TORCHRUN, SLURM | {"SLURM_STEP_ID": "0"}])
def test_one_that_the_first_process_started_has_the_place_that_it_gave(config, given, monkeypatch, left_over):
    given(left_over | {"RANK": "2", "LOCAL_RANK": "2", "NODE_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29876"})
    monkeypatch.setitem(sys._xoptions, command_to_follow([])[-1], True)
    found = environment_of(config(devices=3))
    assert found.global_rank() == found.local_rank() == rank_zero_only.rank == 2 and found.main_port == 29876
    assert not starts_others(config(devices=3), found)


@pytest.mark.parametrize(("variables", "devices", "told"), [
    (SLURM | {"SLURM_STEP_ID": "0"}, 3, "srun"), (SLURM | {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2"}, 2, "srun"),
    ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, 2, "--ntasks-per-node=2"),
    ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "x"}, 2, "srun"),
    ({name: value for name, value in SLURM.items() if name != "SLURM_PROCID"} | {"SLURM_STEP_ID": "0"}, 2, "no 'SLURM_PROCID'"),
    (LSF, 2, "jsrun"), (TORCHRUN, 1, "torchrun"), (TORCHRUN, 4, "torchrun"), (TORCHRUN | {"MASTER_PORT": "x"}, 2, "torchrun"),
    ({"TORCHELASTIC_RUN_ID": "none"}, 2, "torchrun"), (BY_HAND | {"LOCAL_RANK": "2"}, 2, "LOCAL_RANK"),
    (BY_HAND | {"MASTER_PORT": "x"}, 2, "LOCAL_RANK"), (BY_HAND | {"MASTER_PORT": "0"}, 2, "LOCAL_RANK"),
    (STEP, 3, "srun"), (STEP | {"SLURM_PROCID": "2"}, 2, "srun"), (STEP | {"SLURM_LOCALID": "2"}, 2, "srun"),
])
def test_what_a_launcher_says_that_does_not_fit_is_told_before_anything_is_written(config, given, variables, devices, told):
    given(variables)
    run = config(devices=devices)
    with pytest.raises(UserError, match=f"--devices {devices}: ") as caught:
        train(run, {})
    assert told in str(caught.value) and not Path(run.run.proj_dir).exists()


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "2"}, LSF])
def test_a_run_in_a_batch_job(config, given, variables):
    given(variables)
    run = config(epoch_steps=1, epoch_count=1)
    train(run, {})
    assert len(lines(Path(run.run.proj_dir) / "metrics.jsonl")) == 1


def test_lightnings_own_variables_change_no_run_and_are_told(config, given, capsys):
    given({"PL_TRAINER_MAX_STEPS": "1", "PL_TRAINER_FAST_DEV_RUN": "1", "PL_TRAINER_LIMIT_TRAIN_BATCHES": "1",
           "PL_TRAINER_NO_SUCH": "1", "PL_DEEPSPEED_CONFIG_PATH": "/nope"})
    run = config(epoch_steps=3, epoch_count=2)
    train(run, {})
    assert [line["step"] for line in lines(Path(run.run.proj_dir) / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("note: no effect: PL_DEEPSPEED_CONFIG_PATH, PL_TRAINER_FAST_DEV_RUN, "
                                         "PL_TRAINER_LIMIT_TRAIN_BATCHES, PL_TRAINER_MAX_STEPS") == 1
    capsys.readouterr()
    train(changed(run, proj_dir=f"{run.run.proj_dir}-2", epoch_steps=1, epoch_count=1), {})
    assert "PL_" not in capsys.readouterr().err


def test_settings_are_told_once_and_gone(given):
    given({"PL_TRAINER_DEVICES": "7", "PL_DEEPSPEED_CONFIG_PATH": "x", "PL_GLOBAL_SEED": "1"})
    line, = ignore_settings()
    assert line.startswith("note: no effect: PL_DEEPSPEED_CONFIG_PATH, PL_TRAINER_DEVICES (")
    assert {name for name in os.environ if name.startswith("PL_")} == {"PL_GLOBAL_SEED"}  # which sets nothing of a run
    assert ignore_settings() == ()


def command(config, **flags) -> list[str]:
    run = config()
    flags = {"load_model": run.model.load_model, "rlhf_train_file": run.data.rlhf_train_file, "proj_dir": run.run.proj_dir,
             "accelerator": "cpu", "precision": "fp32", "ctx_len": 512, "lora_r": 4, "samples": 0, "epoch_steps": 2,
             "devices": 2} | flags
    return ["train.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["none", "torchrun", "srun"])
def test_two_processes_by_each_launcher(config, given, launcher):
    """None: in a batch job, with variables that are left over, of which the others see nothing."""
    given({})
    environment, words = os.environ | {"OMP_NUM_THREADS": "1"}, command(config)
    starts = {"none": [([], SLURM | {"SLURM_PROCID": "0", "RANK": "1", "MASTER_ADDR": "nowhere.invalid"})],
              "torchrun": [(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], {})],
              "srun": [([], SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": "29581"})
                       for rank in ("0", "1")]}[launcher]
    processes = [subprocess.Popen([sys.executable, *before, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                  env=environment | variables) for before, variables in starts]
    for process in processes:
        err = process.communicate(timeout=HUNG)[1]
        assert process.returncode == 0, err
    assert [line["step"] for line in lines(Path(config().run.proj_dir) / "metrics.jsonl")] == [1, 2]
