"""Locks of extension builds whose process was killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from src.training.deepspeed import remove_dead_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("place", ["cpu_adam", "py311_cu130/utils", "py311_cu130/fused_adam"])
def test_a_killed_builders_lock_goes_and_a_living_ones_stays(tmp_path, capsys, place):
    lock, others = tmp_path / place / "lock", tmp_path / "somebody_elses" / "lock"
    for path in (lock, others):
        path.parent.mkdir(parents=True)
    others.touch()
    long_ago = time.time() - 601
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout.readline() == "held\n"
    os.utime(lock, (long_ago, long_ago))
    remove_dead_locks(tmp_path)
    assert lock.exists() and not capsys.readouterr().err
    process.kill()
    process.wait()
    lock.touch()  # its builder may be where no process of it is seen
    remove_dead_locks(tmp_path)
    assert lock.exists() and not capsys.readouterr().err
    os.utime(lock, (long_ago, long_ago))
    remove_dead_locks(tmp_path)
    assert not lock.exists() and others.exists()
    assert capsys.readouterr().err == f"{lock}: removed, since it is over 10 minutes old and no process holds it\n"
    FileBaton(str(lock)).wait()  # comes back at once


def test_where_no_process_can_be_seen_no_lock_goes(tmp_path, monkeypatch):
    (tmp_path / "utils").mkdir()
    lock = tmp_path / "utils" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
    remove_dead_locks(tmp_path)
    assert exists(lock)
