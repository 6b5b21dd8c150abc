"""The compiled kernels in their cache: damaged ones are seen before they are loaded, and replaced."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src import kernels
from src.kernels import library
from tests.compiled import compiled

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
from src import kernels
for folder in sys.argv[1:]:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    kernels.missing.cache_clear()
    print(kernels.missing("cpu"))
"""


@pytest.fixture
def cache(tmp_path) -> tuple[Path, Path]:
    """A cache that holds the kernels alone, as the environment variable names it, and their file in it."""
    if (reason := kernels.missing("cpu")) is not None:
        pytest.skip(reason)
    folder = library.folder_of("rwkv_wkv_cpu", ())
    kept, = folder.glob("rwkv_wkv_cpu-*.so")
    (tmp_path / folder.name).mkdir()
    return tmp_path, Path(shutil.copy(kept, tmp_path / folder.name))


def in_a_new_process(*folders: Path) -> subprocess.CompletedProcess:
    """Why the kernels are missing, by each of these caches, where there is no compiler to build others."""
    return subprocess.run([sys.executable, "-c", PROGRAM, *map(str, folders)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"CXX": "no-such-compiler"})


def test_a_damaged_library_is_removed_and_never_loaded(cache):
    """Cut, empty, with a byte changed: a bus error would end the process without a word."""
    folder, path = cache
    data = path.read_bytes()
    middle = len(data) // 2
    paths = [folder / name / path.parent.name / path.name for name in ("cut", "empty", "changed")]
    for damaged, content in zip(paths, (data[:middle], b"", data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]),
                                strict=True):
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(content)
    result = in_a_new_process(*(damaged.parents[1] for damaged in paths))
    assert result.returncode == 0 and result.stdout.count("no C++ compiler (no-such-compiler)") == 3
    told = result.stderr.splitlines()
    for damaged, removed, fallen_back in zip(paths, told[::2], told[1::2], strict=True):
        assert removed.startswith(f"{damaged}: removed") and "it is damaged" in removed and "are not used" in fallen_back
        assert not damaged.exists()


def test_a_library_that_this_system_can_not_load_is_named(cache):
    """Its name fits its content; what it lacks here may be there for the next process."""
    folder, path = cache
    path.unlink()
    strange = path.parent / "rwkv_wkv_cpu.so"
    strange.write_bytes(b"\x7fELF of another machine")
    kept = library.keep(strange, path.parent)
    result = in_a_new_process(folder)
    assert result.returncode == 0 and str(kept) in result.stdout
    assert result.stderr.startswith("The WKV kernels for cpu are not used: ") and kept.exists()


def test_the_kept_library_is_taken_without_a_word(cache):
    folder, path = cache
    result = in_a_new_process(folder)
    assert result.stdout == "None\n" and not result.stderr and path.exists()


@compiled
@pytest.mark.slow
def test_a_damaged_library_is_built_again_where_PATH_is_not_set(cache):
    folder, path = cache
    os.truncate(path, 100_000)
    environment = {name: value for name, value in os.environ.items() if name != "PATH"}
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert result.stdout == "None\n", result.stderr
    removed, building = result.stderr.splitlines()
    assert removed.startswith(f"{path}: removed") and building.startswith("Building")
    assert len(list(path.parent.glob("*.so"))) == 1
    assert not (path.parent / "build").exists()


def test_a_builder_that_is_at_work_is_waited_for_with_a_line(tmp_path, capsys):
    from filelock import FileLock

    class Released(FileLock):
        def acquire(self, *args, **named):
            if named.get("timeout") is None:
                other.release()
            return super().acquire(*args, **named)

    other = FileLock(tmp_path / "one_builder")
    other.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("filelock.FileLock", Released)
        with library._only_builder(tmp_path, "cpu"):
            pass
    assert capsys.readouterr().err == "Waiting for another process to build the WKV kernels for cpu ...\n"


def test_a_failure_without_a_message_has_its_kind(monkeypatch, capsys):
    def fail(device: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(kernels, "load_library", fail)
    assert kernels.missing.__wrapped__("cpu") == "RuntimeError"
    assert "are not used: RuntimeError" in capsys.readouterr().err
