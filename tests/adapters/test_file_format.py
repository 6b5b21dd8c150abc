"""An adapter file as the format describes it, written by the safetensors library: read, merged by the published formulas, told
from others."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from src.adapters.apply import apply_layer_profile
from src.adapters.files import load_adapter, merge_adapter, read_adapter, save_adapter
from src.adapters.layer_profile import LayerSetting
from src.checkpoint.io import fingerprint
from src.errors import UserError
from tests.adapters.tiny import FFN, VOCABULARY, WIDTH, profile, tiny_model, tiny_weights

RATES = {"weight_lr_init": 1e-3, "weight_lr_final": 1e-4}
# A row needs its layer and mode, and what the mode needs.
ROWS = [
    {"layer": "emb", "mode": "full", **RATES},
    {"layer": "0", "mode": "lora", "rank": 2, "alpha": 6.0, "dropout": 0.5, "weight_decay": 0.25, **RATES,
     "reject_parts": ["att", "ffn.value"], "full_parts": ["ln1.bias"]},
    {"layer": "1", "mode": "bone", "rank": 3, **RATES, "state_lr_init": 0.5, "state_lr_final": 0.125,
     "reject_parts": ["att", "ffn.value"]},
    {"layer": "head", "mode": "dora", "rank": 2, "alpha": 4.0, **RATES},
]
SETTINGS = [
    LayerSetting("emb", "full", 0, 0.0, 0.0, 1e-3, 1e-4, 0.0, 0.0, 0.0),
    LayerSetting("0", "lora", 2, 6.0, 0.5, 1e-3, 1e-4, 0.25, 0.0, 0.0, ("att", "ffn.value"), ("ln1.bias",)),
    LayerSetting("1", "bone", 3, 0.0, 0.0, 1e-3, 1e-4, 0.0, 0.5, 0.125, ("att", "ffn.value")),
    LayerSetting("head", "dora", 2, 4.0, 0.0, 1e-3, 1e-4, 0.0, 0.0, 0.0),
]
SHAPES = {
    "emb.weight": (VOCABULARY, WIDTH), "blocks.0.ffn.key.lora_A": (2, WIDTH), "blocks.0.ffn.key.lora_B": (FFN, 2),
    "blocks.0.ln1.bias": (WIDTH,), "blocks.1.ffn.key.disha": (3, FFN), "head.lora_A": (2, WIDTH),
    "head.lora_B": (VOCABULARY, 2), "head.lora_M": (VOCABULARY,),
}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(path, rows=ROWS, weights=None, **metadata):
    save_file(tensors() if weights is None else weights, path, {
        "adapter_format": "1", "base_fingerprint": fingerprint(tiny_weights()), "profile": json.dumps(rows),
        "extra": json.dumps({"step": 3})} | metadata)
    return path


def test_it_is_read_and_merges_by_the_published_formulas(tmp_path):
    path = write(tmp_path / "adapter.safetensors")
    adapter = read_adapter(path)
    assert adapter.settings == SETTINGS and adapter.extra == {"step": 3} and adapter.path == path
    base, ours = tiny_weights(), tensors()
    merged = merge_adapter(base, path)
    shard = [number % 3 for number in range(WIDTH)]  # the row of D that an input meets
    v = base["head.weight"].double() + 4.0 / 2 * ours["head.lora_B"].double() @ ours["head.lora_A"].double()
    expected = {
        "emb.weight": ours["emb.weight"], "blocks.0.ln1.bias": ours["blocks.0.ln1.bias"],
        "blocks.0.ffn.key.weight": base["blocks.0.ffn.key.weight"].double()
        + 6.0 / 2 * ours["blocks.0.ffn.key.lora_B"].double() @ ours["blocks.0.ffn.key.lora_A"].double(),
        "blocks.1.ffn.key.weight": base["blocks.1.ffn.key.weight"].double() + ours["blocks.1.ffn.key.disha"].double().T[:, shard],
        "head.weight": ours["head.lora_M"].double()[:, None] * v / v.norm(dim=1, keepdim=True),
    }
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected.get(name, base[name]).float(), rtol=1e-5, atol=1e-5)
    assert {name for name in base if merged[name] is not base[name]} == expected.keys()


def test_what_is_written_names_the_format_and_has_what_it_needs(tmp_path):
    path, settings = tmp_path / "adapter.safetensors", profile("freeze", "lora", "freeze", "freeze")
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, settings, 0)
    save_adapter(model, path, settings, fingerprint(tiny_weights()), {"step": 3})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["adapter_format"] == "1" and metadata["base_fingerprint"] == fingerprint(tiny_weights())
    assert json.loads(metadata["extra"]) == {"step": 3}
    emb, first, second, head = json.loads(metadata["profile"])
    assert [row["layer"] for row in (emb, first, second, head)] == ["emb", "0", "1", "head"]
    assert (emb["mode"], first["mode"], first["rank"], first["alpha"]) == ("freeze", "lora", 4, 8.0)


@pytest.mark.parametrize("version", ["0", "2", "1.0", "", "x" * 1000])
def test_another_version_is_refused(tmp_path, version):
    path = write(tmp_path / "adapter.safetensors", adapter_format=version)
    with pytest.raises(UserError, match="adapter format .* reads format 1") as caught:
        read_adapter(path)
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(("changes", "said"), [
    ({"weights": {"blocks.2.att.key.lora_A": torch.ones(2, WIDTH)}}, "no profile row for layer 2"),
    ({"rows": [*ROWS, ROWS[0]]}, "rows"), ({"rows": ROWS[::-1]}, "not emb, 0, 1"), ({"rows": [*ROWS[:2], ROWS[3]]}, "layer 1"),
    ({"rows": [*ROWS[:3], {**ROWS[2], "layer": "2"}, {**ROWS[2], "layer": "4"}, ROWS[3]]}, "4 is not in"),
    ({"base_fingerprint": "0" * 63}, "fingerprint"), ({"base_fingerprint": "G" * 64}, "fingerprint"),
])
def test_reading_alone_refuses_metadata_that_do_not_fit_each_other(tmp_path, changes, said):
    with pytest.raises(UserError, match=f"metadata are damaged .*{said}"):
        read_adapter(write(tmp_path / "adapter.safetensors", **changes))


def test_a_model_with_adapters_in_another_mode_is_told_both(tmp_path):
    settings = profile("freeze", "lora", "freeze", "freeze")
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, settings, 0)
    save_adapter(model, tmp_path / "adapter.safetensors", settings, fingerprint(tiny_weights()), {})
    for mode in ("dora", "pissa", "bone"):
        other = tiny_model(tiny_weights())
        apply_layer_profile(other, profile("freeze", mode, "freeze", "freeze"), 0)
        with pytest.raises(UserError, match=f"blocks.0.att.receptance .* mode lora, .* says {mode}"):
            load_adapter(other, tmp_path / "adapter.safetensors")
