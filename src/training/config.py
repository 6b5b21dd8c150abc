"""All settings of a training run, in frozen groups: what each flag of train.py takes, its default and what it does."""

from collections.abc import Mapping
from dataclasses import dataclass

from src import values
from src.adapters.layer_profile import BLOCK_MODES
from src.data.faults import SKIP_BAD_ROWS
from src.data.source import DATA_FORMATS
from src.data.thinking import HELP_LOSS_ON, LOSS_ON
from src.numbers import BELOW_ONE
from src.preference.loss import LOSSES, loss_flags, without_reference
from src.settings import NEEDED, RESOLVED, flag, group, table

STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
              "deepspeed_stage_3_offload")
_decay = values.number(*BELOW_ONE, or_zero=True)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base, and what trains in it."""

    load_model: str = flag(values.input_file, NEEDED, "base checkpoint, the official .pth or .safetensors", free=True)
    layer_profile: str = flag(values.layer_profile, "auto",
                              "CSV that says which layer trains and how (layerprofile/readme.md), or auto: every block alike, "
                              "by the next three")
    peft: str = flag(BLOCK_MODES, "lora", "with --layer_profile auto: mode of every block")
    lora_r: int = flag(values.positive, 16, "with --layer_profile auto: rank")
    lora_alpha: float = flag(values.strength, 32.0, "with --layer_profile auto: alpha")
    load_adapter: str | None = flag(values.input_file, None,
                                    "adapter file to continue from, of the same base and layer profile; the references stay the "
                                    "base's")
    quantization: str | None = None  # resolved from --quant and --quant_mode: None, or a scheme of src.quantization


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What the run reads. With `--sft 1` it reads texts, and rlhf_train_file is None."""

    rlhf_train_file: str | None = flag(values.input_file, None,
                                       ".save file of rlhf_dpo_generate_save.py; required unless --sft 1", free=True)
    train_data_file: str | None = flag(values.input_file, None,
                                       "with --sft 1: prompts and answers, conversations or plain text, as "
                                       f"{DATA_FORMATS}, documents as .txt, or a tokenized corpus as .bin and .idx", free=True)
    skip_bad_rows: bool = flag(values.zero_or_one, False, f"with --sft 1, {SKIP_BAD_ROWS}")
    tokenizer: str | None = flag(values.tokenizer, None, f"with --sft 1: {values.TOKENIZER}")
    template: str | None = flag(values.template, None,
                                f"with --sft 1: {values.TEMPLATE}; if not given, classic. Pairs have the template of their "
                                ".save, which is compared with it")
    loss_on: str | None = flag(LOSS_ON, None,
                               f"with --sft 1: {HELP_LOSS_ON}; if not given, {LOSS_ON[0]}. Pairs have that of their .save, which "
                               "is compared with it")
    eval_file: str | None = flag(values.input_file, None,
                                 "held-out pairs (.save), or with --sft 1 texts like --train_data_file: evaluated "
                                 "before the first step and after each epoch", free=True)
    rlhf_max_corpus_len: int = flag(values.positive, RESOLVED,
                                    "pairs longer than this many tokens are left out, and their number is printed (if not "
                                    "given: --ctx_len)")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What is learned."""

    sft: bool = flag(values.zero_or_one, False,
                     "1: no preferences; next-token prediction on --train_data_file, for rows with a prompt only on the answer")
    loss: str = flag(tuple(LOSSES), "dpo", f"without a reference: {', '.join(without_reference())}")
    of_the_losses: Mapping[str, float] = table(loss_flags())
    sft_on_prompt: bool = flag(values.zero_or_one, False, "1: the SFT loss is over prompt and answer, also with --sft 1")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How it is learned: batches, steps, rates."""

    epoch_steps: int = flag(values.not_negative, 200, "micro-batches an epoch on each device; 0: enough to see every pair once")
    epoch_count: int = flag(values.whole(1, 10**6), 1, "epochs to train")
    epoch_begin: int = flag(values.whole(0, 10**6), 0,
                            "number of epochs done before: file names and the order of pairs continue from it")
    epoch_save: int = flag(values.positive, 1, "save the adapter every so many epochs, and at the end", free=True)
    micro_bsz: int = flag(values.whole(1, 4096), 1, "pairs in a micro-batch, which a device computes at once")
    batch_tokens: int = flag(values.whole(0, 10**6), 0,
                             "instead of --micro_bsz: tokens in a micro-batch, which gets as many pairs of similar length as "
                             "fit")
    accumulate_grad_batches: int = flag(values.whole(1, 10**5), 1,
                                        "micro-batches an optimizer step on each device; the last step of an epoch takes those "
                                        "left; the gradient is that of the mean over all pairs of the step (over its tokens "
                                        "with --sft 1), however they are split")
    lr_init: float = flag(values.rate, 1e-5, "first learning rate of a cosine, unless the layer profile's rates are used")
    lr_final: float = flag(values.rate, 1e-6, "last learning rate, likewise")
    lr_advanced: bool = flag(values.zero_or_one, True,
                             "1: use the layer profile's rates; 0: use --lr_init and --lr_final in every layer")
    warmup_steps: int = flag(values.not_negative, 0,
                             "optimizer steps of linear warm-up: step n of N has n / (N + 1) of the cosine's rate")
    beta1: float = flag(_decay, 0.9, "AdamW")
    beta2: float = flag(_decay, 0.999, "AdamW")
    adam_eps: float = flag(values.number(1e-30, 1e3), 1e-8, "AdamW; weight decay is the layer profile's, of large matrices only")
    optim: str = flag(("adamw", "adamw_8bit"), "adamw",
                      "adamw_8bit stores its averages in 8 bits (bitsandbytes), in a quarter of the memory")
    gradient_clip_val: float = flag(values.number(1e-12, 1e12, or_zero=True), 1.0, "largest gradient norm; 0 does not clip")
    grad_cp: bool = flag(values.zero_or_one, False,
                         "1: gradient checkpointing: much less memory, a sixth slower on a CPU, a third on a GPU", free=True)
    compile: bool = flag(values.zero_or_one, False,
                         "1: torch.compile the blocks: steps some percent faster after a minute or two of compiling; not with "
                         "--grad_cp 1", free=True)


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Where it is computed."""

    accelerator: str = flag(("auto", "cpu", "gpu"), "auto", "auto: gpu if there is one", free=True)
    devices: int = flag(values.whole(1, 1024), 1, "number of GPUs, or of processes on the CPU")
    precision: str = flag(values.Reader(str, "fp32 or bf16"), RESOLVED,
                          "fp32 or bf16; trained weights are kept in float32 either way; if not given, bf16 on a GPU, fp32 on "
                          "the CPU")
    strategy: str = flag(STRATEGIES, "auto", "Lightning's strategy", free=True)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The run's folder, and what is logged and reported."""

    proj_dir: str = flag(values.path, NEEDED,
                         "folder of the run, for report.html, adapters, metrics.jsonl and all else that it writes", free=True)
    wandb: str = flag(values.wandb_project, "",
                      "wandb project, entity/project, or its address; logs offline if the server can't be used; empty:"
                      " no wandb", free=True)
    tensorboard: bool = flag(values.zero_or_one, False, "1: log to TensorBoard, in the run's folder tensorboard", free=True)
    samples: int = flag(values.whole(0, 1000), 3,
                        "held-out prompts (training prompts without --eval_file) to answer before the first step"
                        " and after each epoch, for the report; 0: none", free=True)
    sample_tokens: int = flag(values.whole(1, 10**4), 100, "longest such answer, in tokens", free=True)
    resume: bool = flag(values.zero_or_one, False, "1: resume the interrupted run in --proj_dir", free=True)
    seed: int = flag(values.seed, 0, "order of pairs, adapters' random starts, dropout")
    allow_reference_mismatch: bool = flag(values.zero_or_one, False,
        "1: train even where the references were computed at another precision or quantization")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """train.py's flags, all resolved: a None means that there is none."""

    model: ModelSettings = group("model")
    data: DataSettings = group("data")
    objective: ObjectiveSettings = group("objective")
    steps: StepSettings = group("steps and rates")
    machine: MachineSettings = group("machine")
    run: RunSettings = group(None)
