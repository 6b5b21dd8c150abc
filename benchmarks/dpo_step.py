"""How fast is a DPO step, how near the machine's own matrix products, and what does each saving bring?

    python benchmarks/dpo_step.py                           # 0.1B, LoRA of rank 16, prompt 300, answers of 200 and 200 tokens
    python benchmarks/dpo_step.py --pairs_csv pairs.csv     # the lengths of real pairs instead
    python benchmarks/dpo_step.py --n_layer 24 --n_embd 2048 --quant nf4 --precision bf16 --grad_cp 1 --lengths 1024 1024 1024

Each variant is a process of its own; steps go round in turns, so that a busy machine slows all alike. A step is forward,
backward, clipping and AdamW. TRL's DPOTrainer joins, on a Llama of equal size and rank, where `trl` and `peft` are installed
(`make bench` does it). Prints a table and writes benchmarks/results/dpo_step_DEVICE_NAME.json.

The share of the machine's rate is over the products that the pairs need at least: forward and towards the inputs (4 operations
for a frozen weight, 6 for one in training) for each token of prompt, chosen and reject once, the head's for the answers' tokens
alone. The rate is that of 2048 x 2048 x 2048 in the same run and precision.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.adapters.apply import apply_layer_profile  # noqa: E402
from src.adapters.layer_profile import auto_layer_profile  # noqa: E402
from src.data.packing import PackedBatch, pack_pairs  # noqa: E402
from src.data.read import read_pairs  # noqa: E402
from src.data.token_lists import TokenPair  # noqa: E402
from src.data.tokenize import tokenize_pairs  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.kernels import recycle_memory  # noqa: E402
from src.model import build_model  # noqa: E402
from src.preference import log_probs  # noqa: E402
from src.preference.objective import Objective, pair_losses  # noqa: E402
from src.tokenizer import load_tokenizer  # noqa: E402
from tests.random_checkpoint import make_dimensions, random_weights  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY, RANK = 65536, 16
# What each variant does without, 1 shared prompts, 2 packing, 3 log-probabilities without logits; c is --grad_cp 1.
VARIANTS = {"this step": "", "--grad_cp 1": "c", "prompts not shared": "1", "padded": "2", "logits in memory": "3",
            "all three": "123"}
TRL = {"TRL": False, "TRL, references cached": True}


def main() -> None:
    options = parse()
    pairs = real_pairs(options) if options.pairs_csv else synthetic_pairs(options)
    names = list(VARIANTS)
    if not options.quant and all(importlib.util.find_spec(name) for name in ("trl", "peft")):
        names += TRL
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name in names:
        connection, other = context.Pipe()
        target = trl_worker if name in TRL else worker
        context.Process(target=target, args=(name, pairs, options, other), daemon=True).start()
        workers[name] = (connection, connection.recv())  # one after the other: what it needs to know, once it is ready
    seconds, rates = {name: [] for name in names}, []
    for turn in range(options.rounds + 1):
        rates.append(gemm_rate(options))
        for name, (connection, _) in workers.items():
            connection.send("go")
            taken = connection.recv()
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    rows, needed, rate = [], workers["this step"][1]["flops"], median(rates)
    for name, (connection, _) in workers.items():
        connection.send("end")
        found = connection.recv()
        step_s = median(seconds[name])
        ratio = median(x / y for x, y in zip(seconds[name], seconds["this step"], strict=True))
        rows.append({"variant": name, "step_s": step_s, "pairs_per_s": len(pairs) / step_s, "over_this": ratio,
                     "gemm_share": needed / step_s / rate, **found})
    report(rows, pairs, rate, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--version", choices=("x060", "x070"), default="x070")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--quant", choices=("nf4", "int8"))
    parser.add_argument("--grad_cp", type=int, choices=(0, 1), default=0, help="1: in all variants")
    parser.add_argument("--lengths", type=int, nargs=3, default=(300, 200, 200), metavar=("PROMPT", "CHOSEN", "REJECT"))
    parser.add_argument("--pairs", type=int, default=1, help="pairs in a step")
    parser.add_argument("--pairs_csv", help="CSV with prompt, chosen, reject, whose lengths to take; drawn by seed 0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the results' file")
    return parser.parse_args()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synthetic_pairs(options: argparse.Namespace) -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    return [TokenPair(*(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in options.lengths))
            for _ in range(options.pairs)]


def real_pairs(options: argparse.Namespace) -> list[tuple]:
    rows = read_pairs(options.pairs_csv, require_reject=True).rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:options.pairs].tolist()
    return tokenize_pairs([rows[index] for index in chosen], load_tokenizer("world", VOCABULARY), None, 1024, 0)[0]


def gemm_rate(options: argparse.Namespace) -> float:
    """Operations a second of a square product, the best of five."""
    x, y = (torch.randn(2048, 2048, device=device(), dtype=DTYPES[options.precision]) for _ in range(2))
    times = []
    for _ in range(5):
        started = now()
        x @ y
        times.append(now() - started)
    return 2 * 2048**3 / min(times)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def worker(name: str, pairs: list[tuple], options: argparse.Namespace, connection) -> None:
    """Our step, without what the variant leaves out."""
    without, grad_cp = VARIANTS[name], bool(options.grad_cp) or "c" in VARIANTS[name]
    if device() == "cpu":
        recycle_memory()  # as train.py does
    dimensions = make_dimensions(options.version, options.n_layer, options.n_embd, 64, VOCABULARY)
    model = build_model(random_weights(dimensions), dimensions, DTYPES[options.precision], device(), options.quant)
    apply_layer_profile(model, auto_layer_profile(options.n_layer, 1e-4, 1e-5, rank=RANK), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    objective = Objective({"beta": 0.1}, alpha=0.1)
    plain = mock.patch.object(log_probs, "target_log_probs", whole_logits if "3" in without else log_probs.target_log_probs)

    def step() -> None:
        batch = pack_pairs(pairs, share_prompts="1" not in without)
        batch = (pad(batch) if "2" in without else batch).to(device())
        losses = pair_losses(model, batch, [(0.0, 0.0)] * len(pairs), objective, grad_cp)
        losses["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with plain:
        serve(step, connection, {"flops": model_flops(model, pairs)})


def serve(step, connection, facts: dict) -> None:
    """Steps at the parent's word, and the peak of memory at the end."""
    facts["memory_before"] = peak_memory()
    connection.send(facts)
    while connection.recv() == "go":
        started = now()
        step()
        connection.send(now() - started)
    connection.send({"peak_bytes": peak_memory(), "before_bytes": facts["memory_before"]})


def peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def whole_logits(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


def pad(batch: PackedBatch) -> PackedBatch:
    """Prompts as long as the longest, filled up in front; answers likewise, at the end. For time and memory only."""
    lengths, n_prompts = batch.cu_seqlens.diff().long(), batch.n_prompts
    longest = torch.cat([part.max().expand(len(part)) for part in lengths.tensor_split((n_prompts,))])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), longest.cumsum(0)))
    first = starts[:-1].clone()
    first[:n_prompts] += longest[:n_prompts] - lengths[:n_prompts]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    moved = first[sequence] + torch.arange(len(batch.tokens)) - batch.cu_seqlens[:-1].long()[sequence]
    tokens = torch.zeros(int(starts[-1]), dtype=torch.int64).index_copy(0, moved, batch.tokens)
    return replace(batch, tokens=tokens, cu_seqlens=starts.int(), answer_positions=moved[batch.answer_positions],
                   prompt_positions=moved[batch.prompt_positions])


def model_flops(model: torch.nn.Module, pairs: list[tuple]) -> float:
    """Operations of the products that a step needs at least; the recurrence's own are left out."""
    matrices = [*model.blocks.named_parameters()]
    weights = sum((6 if x.requires_grad else 4) * x.numel() for _, x in matrices if x.dim() >= 2 and min(x.shape[-2:]) > 1)
    weights += sum(4 * x.in_features * x.out_features for x in model.blocks.modules() if hasattr(x, "codes"))
    tokens, answers = sum(sum(map(len, pair[:3])) for pair in pairs), sum(len(pair[1]) + len(pair[2]) for pair in pairs)
    return tokens * weights + answers * 4 * VOCABULARY * model.dimensions.n_embd


def trl_worker(name: str, pairs: list[tuple], options: argparse.Namespace, connection) -> None:
    """TRL's trainer on a Llama with as many weights in its blocks; the same pairs' lengths, LoRA on the same kinds of layers."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    width = options.n_embd
    # 4 D^2 of attention and 3 D I of the FFN: 12 D^2, as RWKV-7's blocks.
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3, num_attention_heads=width // 64,
        num_hidden_layers=options.n_layer, max_position_embeddings=4096, tie_word_embeddings=False)
    model = LlamaForCausalLM(config).to(device(), DTYPES[options.precision])
    words = {f"t{number}": number for number in range(VOCABULARY)}
    split = Tokenizer(models.WordLevel(words, unk_token="t0"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, eos_token="t0", pad_token="t0", unk_token="t0")

    def text(tokens: list[int]) -> str:
        return "".join(f" t{token}" for token in tokens)

    columns = {key: [text(pair[at]) for pair in pairs] for at, key in enumerate(("prompt", "chosen", "rejected"))}
    dataset = datasets.Dataset.from_dict({key: texts * (options.rounds + 1) for key, texts in columns.items()})

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            connection.send({"memory_before": peak_memory()})

        def on_step_begin(self, *_, **__):
            assert connection.recv() == "go"
            self.started = now()

        def on_step_end(self, *_, **__):
            connection.send(now() - self.started)

    folder = tempfile.mkdtemp(prefix="trl_")
    arguments = DPOConfig(
        output_dir=folder, per_device_train_batch_size=len(pairs), max_steps=options.rounds + 1, learning_rate=1e-5,
        max_length=4096, bf16=options.precision == "bf16", gradient_checkpointing=bool(options.grad_cp), beta=0.1,
        precompute_ref_log_probs=TRL[name], max_grad_norm=1.0, use_cpu=device() == "cpu", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora,
                         callbacks=[Turns()])
    before = peak_memory()
    trainer.train()
    assert connection.recv() == "end"
    connection.send({"peak_bytes": peak_memory(), "before_bytes": before})


def report(rows: list[dict], pairs: list[tuple], rate: float, options: argparse.Namespace) -> None:
    table = Table("", "s a step", "pairs a second", "times this step", "share of GEMM rate", "peak GB", "of it before")
    for row in rows:
        table.add_row(row["variant"], f"{row['step_s']:.2f}", f"{row['pairs_per_s']:.2f}", f"{row['over_this']:.2f}",
                      f"{100 * row['gemm_share']:.0f} %", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['before_bytes'] / 1e9:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{rate / 1e9:.0f} GFLOP/s of square products, {options.precision}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = {"device": name, "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
               "torch": torch.__version__, "gemm_flops": rate}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    lengths = [[len(part) for part in pair[:3]] for pair in pairs]
    label = options.name or ("real_" if options.pairs_csv else "") + options.precision
    model = {name: getattr(options, name) for name in ("version", "n_layer", "n_embd", "quant", "grad_cp")}
    with atomic_write(results / f"dpo_step_{device()}_{label}.json", "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "model": model, "lengths": lengths, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
