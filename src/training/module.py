"""The Lightning module: one micro-batch's loss, the optimizer with its rates by layer, and the state for a resume."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.adapters.apply import parameter_groups
from src.adapters.files import adapter_tensors
from src.adapters.layer_profile import LayerSetting
from src.data.packing import TextBatch
from src.model import RWKV
from src.preference.kto import kl_estimate, kl_part
from src.preference.loss import LOSSES
from src.preference.objective import Objective, pair_losses, text_losses
from src.quantization.bitsandbytes import load_bitsandbytes
from src.training.config import ObjectiveSettings, TrainConfig
from src.training.schedule import learning_rate


class PreferenceModule(pl.LightningModule):
    """Trains the parameters of `model` that require gradients; its checkpoints hold the tensors of an adapter file."""

    # A checkpoint lacks the frozen base, which loading leaves as it is.
    strict_loading = False
    # Of the last micro-batch, for metrics: its losses as `pair_losses` gives them, its share of the step, its input tokens with
    # those of the forward passes before it.
    last_losses: dict[str, Tensor]
    last_share: float
    last_tokens: int
    # With KTO, of the last optimizer step that began.
    kl: Tensor | None = None

    def __init__(self, model: RWKV, settings: list[LayerSetting], config: TrainConfig, total_steps: int):
        super().__init__()
        self.model, self.settings, self.config, self.total_steps = model, settings, config, total_steps
        self.objective = objective_of(config.objective)
        self._random_state: dict[str, Any] | None = None

    def training_step(self, batch: tuple, _: int) -> Tensor:
        """The micro-batch's part of its optimizer step's loss, the mean over all pairs (tokens) of the step."""
        packed, references, share, ahead = batch
        if ahead:
            mean = torch.stack([kl_part(self.model, *part) for part in ahead]).sum()
            self.kl = kl_estimate(self.trainer.strategy.reduce(mean, reduce_op="sum"))
        if isinstance(packed, TextBatch):
            losses = text_losses(self.model, packed, self.config.steps.grad_cp)
        else:
            losses = pair_losses(self.model, packed, references, self.objective_now(), grad_cp=self.config.steps.grad_cp)
        loss = share * losses["loss"].sum()
        self.last_losses = {name: values.detach() for name, values in losses.items()}
        # A process that is only kept busy (share 0) computes nothing of the step.
        self.last_share = share
        self.last_tokens = len(packed.tokens) + sum(len(other.tokens) for other, _, its_share in ahead if its_share)
        # Lightning divides each micro-batch's loss by accumulate_grad_batches, even where a step has fewer, and DDP and
        # DeepSpeed average gradients over the processes; the share already includes both.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def objective_now(self) -> Objective:
        """The objective in the current optimizer step."""
        return self.objective if self.kl is None else self.objective.with_kl(self.kl)

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.config
        groups = parameter_groups(self.model, self.settings)
        rates = [(group.pop("lr_init"), group.pop("lr_final")) for group in groups]
        for group in groups:
            del group["names"]
        optimizer = _optimizer(groups, config)

        # The groups' own rate is 1, so the schedule's factor is the rate itself; it may start from 0.
        def schedule(lr_init: float, lr_final: float) -> Callable[[int], float]:
            return lambda step: learning_rate(step, self.total_steps, config.steps.warmup_steps, lr_init, lr_final)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [schedule(*pair) for pair in rates])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"model.{name}" for name in adapter_tensors(self.model)}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["random_state"] = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint["random_state"]

    def on_train_start(self) -> None:
        # At the very end, since setting up draws random numbers too.
        if self._random_state is not None:
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if self._random_state["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all([state.cpu() for state in self._random_state["cuda"]])


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, bitsandbytes' 8-bit one, or DeepSpeed's own on the CPU for its offload."""
    arguments: dict[str, Any] = {"lr": 1.0, "betas": (config.steps.beta1, config.steps.beta2), "eps": config.steps.adam_eps}
    if config.machine.strategy.startswith("deepspeed") and "offload" in config.machine.strategy:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    if config.steps.optim == "adamw_8bit":
        return load_bitsandbytes("--optim adamw_8bit", "--optim adamw").optim.AdamW8bit(groups, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)


def objective_of(settings: ObjectiveSettings) -> Objective:
    """The objective that a run's flags describe."""
    loss, values = LOSSES[settings.loss], settings.of_the_losses
    numbers = {parameter: values[setting.name] for parameter, setting in loss.settings.items()}
    alpha = values[loss.sft_share.name] if loss.sft_share else 1.0
    return Objective(numbers, alpha, settings.sft_on_prompt, settings.loss)


def recorded_objective(settings: ObjectiveSettings) -> dict[str, str | float]:
    """What adapters record of it: the loss, "sft" with `--sft 1`, and by their names the flags that the loss takes."""
    if settings.sft:
        return {"loss": "sft"}
    loss = LOSSES[settings.loss]
    taken = [setting.name for setting in (*loss.settings.values(), loss.sft_share) if setting]
    return {"loss": settings.loss, **{name: settings.of_the_losses[name] for name in taken}}
