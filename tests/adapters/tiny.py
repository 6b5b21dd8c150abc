"""A model of two blocks with the official names, small enough to read; not a recurrence, but linear layers, vectors and norms."""

import torch
from torch import Tensor, nn

from src.adapters.layer_profile import LayerSetting
from src.adapters.linear import Linear
from src.quantization.linear import quantize_linear

WIDTH, FFN, VOCABULARY = 16, 32, 11


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_r, self.r_k = nn.Parameter(torch.empty(1, 1, WIDTH)), nn.Parameter(torch.empty(2, 8))
        self.w1, self.w2 = nn.Parameter(torch.empty(WIDTH, 4)), nn.Parameter(torch.empty(4, WIDTH))
        self.receptance, self.key, self.value, self.output = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.ln_x = nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.x_r.flatten().to(x.dtype) + torch.tanh(x @ self.w1.to(x.dtype)) @ self.w2.to(x.dtype)
        gated = self.receptance(x) * torch.sigmoid(self.key(x)) + self.value(x) * self.r_k.flatten().to(x.dtype)
        return self.output(self.ln_x(gated.float()).to(x.dtype))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_k, self.key, self.value = nn.Parameter(torch.empty(1, 1, WIDTH)), Linear(WIDTH, FFN), Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(torch.relu(self.key(x * self.x_k.flatten().to(x.dtype))))


class Block(nn.Module):
    def __init__(self, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(WIDTH)
        self.ln1, self.ln2, self.att, self.ffn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.ln1(x.float()).to(x.dtype))
        return x + self.ffn(self.ln2(x.float()).to(x.dtype))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList([Block(0), Block(1)])
        self.ln_out, self.head = nn.LayerNorm(WIDTH), Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0].ln0(self.emb(tokens).float())
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_out(x))


def tiny_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors for every name of `Tiny`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in Tiny().state_dict().items()}


def tiny_model(weights: dict[str, Tensor], quantize: str | None = None, quantized: set[int] = frozenset()) -> Tiny:
    """`Tiny` with these weights, the linear layers of some blocks quantized."""
    model = Tiny()
    model.load_state_dict(weights)
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, Linear) and int(name.split(".")[0]) in quantized:
            model.blocks.set_submodule(name, quantize_linear(module.weight.detach(), quantize))
    return model


def profile(*modes: str, reject_parts: tuple[str, ...] = (), **changes) -> list[LayerSetting]:
    """Settings for emb, 0, 1, head with these modes."""
    values = {"rank": 4, "alpha": 8.0, "weight_lr_init": 1e-2, "weight_lr_final": 1e-3, "weight_decay": 0.01} | changes
    return [LayerSetting(layer, mode, reject_parts=reject_parts, **values)
            for layer, mode in zip(("emb", "0", "1", "head"), modes, strict=True)]
