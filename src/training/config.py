"""Everything a training run is told, as one frozen value; src/cli/train.py makes it from the flags."""

from dataclasses import dataclass

from src.preference.objective import Objective


@dataclass(frozen=True)
class TrainConfig:
    """Names are those of the flags; `python train.py --help` says what each does."""

    load_model: str
    proj_dir: str
    rlhf_train_file: str | None
    rlhf_max_corpus_len: int
    eval_file: str | None
    layer_profile: str
    peft: str
    load_adapter: str | None
    lora_r: int
    lora_alpha: float
    epoch_steps: int
    epoch_count: int
    epoch_begin: int
    epoch_save: int
    micro_bsz: int
    batch_tokens: int
    accumulate_grad_batches: int
    lr_init: float
    lr_final: float
    lr_advanced: bool
    warmup_steps: int
    beta1: float
    beta2: float
    adam_eps: float
    optim: str
    gradient_clip_val: float
    dpo_alpha: float
    dpo_beta: float
    sft_on_prompt: bool
    accelerator: str
    devices: int
    precision: str
    strategy: str
    grad_cp: bool
    compile: bool
    quantization: str | None
    wandb: str
    tensorboard: bool
    samples: int
    sample_tokens: int
    seed: int
    resume: bool
    allow_reference_mismatch: bool
    # The objective; beta, alpha and gamma are each loss's own (src.preference.objective).
    loss: str = "dpo"
    label_smoothing: float = 0.0
    orpo_alpha: float = 0.1
    simpo_beta: float = 2.0
    simpo_gamma: float = 1.0
    simpo_alpha: float = 0.0
    cpo_beta: float = 0.1
    cpo_alpha: float = 1.0
    # Texts instead of pairs, of which rlhf_train_file is None then.
    sft: bool = False
    train_data_file: str | None = None
    tokenizer: str | None = None
    skip_bad_rows: bool = False


def objective_of(config: TrainConfig) -> Objective:
    """The objective that a run's flags describe: each loss by its own, the losses on DPO's margin by DPO's."""
    beta, alpha, gamma = {
        "orpo": (config.orpo_alpha, 1.0, 0.0),
        "simpo": (config.simpo_beta, config.simpo_alpha, config.simpo_gamma),
        "cpo": (config.cpo_beta, config.cpo_alpha, 0.0),
    }.get(config.loss, (config.dpo_beta, config.dpo_alpha, 0.0))
    return Objective(beta, alpha, config.sft_on_prompt, config.loss, gamma, config.label_smoothing)
