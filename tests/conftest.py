"""What several test folders share."""

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from src import kernels
from src.checkpoint.io import save_checkpoint
from src.data.csv import Row
from src.errors import SIGNALS, UserError
from src.preference.config import PrepareConfig
from src.preference.prepare import prepare
from src.quantization.strategy import Strategy
from src.settings import build, defaults
from src.training.config import TrainConfig
from tests import instructions
from tests.pairs_csv import write_pairs_csv
from tests.random_checkpoint import make_dimensions, random_weights
from tests.reliability.warm import draw_nothing
from tests.tiny import tiny_dimensions, trained_tiny

# The same examples in every run, however long a busy machine takes for one. What fixtures give stays as it is between examples.
hypothesis_settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
hypothesis_settings.load_profile("suite")



def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--instructions", metavar="NAME", help="keep torch, its libraries and the CPU's kernels to a set of "
                     f"instructions that this machine has: {', '.join(instructions.SETS)} (default: the machine's own)")


def pytest_configure(config: pytest.Config) -> None:
    # nohup, and a shell that starts a job in the background, have some ignored, which every process of the tests would inherit.
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if name := config.getoption("--instructions"):
        try:
            instructions.use(name)
        except UserError as error:
            raise pytest.UsageError(str(error)) from None


def prepare_csv(model: Path, pairs: Path, output: Path, precision: str = "fp32", quantization: str | None = None,
                profile: str | None = None, **more) -> None:
    """The preprocessing script's work on the CPU, every row once."""
    prepare(PrepareConfig(
        load_model=str(model), input_csv=str(pairs), output_save=str(output), rlhf_max_corpus_len=512,
        layer_profile=profile or "auto", batch_tokens=4096,
        strategy=Strategy(torch.device("cpu"), precision, quantization), **more))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A script that is run within this process takes over the signals."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[pytest.MonkeyPatch]:
    """Runs lay out their curves but draw none, which would take three quarters of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", draw_nothing)
        yield patch


@pytest.fixture
def drawn(undrawn) -> None:
    """For a test that looks at the curves."""
    undrawn.undo()


@pytest.fixture
def keep_to() -> Iterator[Callable[[str], None]]:
    """`keep_to(instructions)`: the CPU's kernels, and they alone, keep to a set for the rest of the test."""
    if (reason := kernels.missing("cpu")) is not None:
        pytest.skip(reason)
    before = torch.ops.rwkv_wkv.instructions()

    def keep_to(name: str) -> None:
        if name not in torch.ops.rwkv_wkv.available_instructions():
            pytest.skip(f"this processor has no {name}")
        kernels.use_instructions(name)

    yield keep_to
    kernels.use_instructions(before)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> Callable[[str, str, int], Path]:
    """`tiny_checkpoints(version, kind, head_size)`: path of a float32 `.pth`, kind "random" or "trained", made at first use."""
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def checkpoint(version: str, kind: str, head_size: int) -> Path:
        path = folder / f"{version}_{kind}_{head_size}.pth"
        weights = trained_tiny(version, head_size) if kind == "trained" else random_weights(tiny_dimensions(version, head_size))
        save_checkpoint(weights, path)
        return path

    return checkpoint


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with x060.pth, x070.pth (64 wide: NF4's blocks fit) and pairs.csv (12 rows of unequal lengths)."""
    folder = tmp_path_factory.mktemp("material")
    for version in ("x060", "x070"):
        save_checkpoint(random_weights(make_dimensions(version, 2, 64, 16, 256)), folder / f"{version}.pth")
    rows = [Row(f"What is {n} plus {n}?" + " Think." * (n % 3), f"It is {2 * n}.", "No idea" + "!" * n) for n in range(12)]
    write_pairs_csv(folder / "pairs.csv", rows)
    return folder


@pytest.fixture(scope="session")
def prepared(material):
    """`prepared(version, precision, quantization, profile)` -> path of a .save made for them, made once."""
    made: dict[tuple, Path] = {}

    def make(version: str, precision: str = "fp32", quantization: str | None = None, profile: str | None = None) -> Path:
        key = (version, precision, quantization, profile)
        if key not in made:
            made[key] = material / f"{version}-{precision}-{quantization}-{len(made)}.save"
            prepare_csv(material / f"{version}.pth", material / "pairs.csv", made[key], precision, quantization, profile)
        return made[key]

    return make


@pytest.fixture
def config(material, prepared, tmp_path):
    """`config(**changes)` -> a short run on the CPU."""

    def make(version: str = "x070", **changes) -> TrainConfig:
        values = defaults(TrainConfig) | dict(
            load_model=str(material / f"{version}.pth"), proj_dir=str(tmp_path / "run"),
            rlhf_train_file=changes.get("rlhf_train_file") or str(prepared(version)), rlhf_max_corpus_len=512, lora_r=4,
            lora_alpha=8.0, epoch_steps=4, epoch_count=2, micro_bsz=2, lr_init=1e-3, lr_final=1e-4, warmup_steps=2, dpo_beta=0.1,
            accelerator="cpu", precision="fp32", samples=0, sample_tokens=8,
        )
        return build(TrainConfig, values | changes)

    return make
