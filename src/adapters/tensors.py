"""Which tensors a layer profile trains on a base, and so an adapter file holds, determined only by names and shapes.

In mode `full` they are the layer's own, including block 0's ln0 and head's ln_out. In an adapter's mode they are the adapter of
each linear weight of the layer (att.receptance, att.key, att.value, att.output and v6's att.gate; ffn.key, ffn.value and v6's
ffn.receptance; or head), while its vectors, low-rank matrices and norms stay as they are. In mode `state` it is the block's
initial state. In any mode FullParts adds the tensors that it names, and RejectParts takes out those that it names.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from src.adapters.adapted import AdaptedLinear
from src.adapters.layer_profile import LayerSetting, all_layers, auto_layer_profile, layer_of, read_layer_profile
from src.adapters.state import LEAF, state_shape
from src.checkpoint.dimensions import UNREAD
from src.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def shapes_of(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def is_linear(name: str) -> bool:
    """Whether a tensor of the official layout is a linear layer's weight [out, in]."""
    layer, local_name = layer_of(name)
    return layer != "emb" and local_name.endswith(".weight") and not local_name.removeprefix("att.").startswith("ln")


def settings_for(base_weights: Mapping[str, Tensor], layer_profile: str, mode: str, rank: int, alpha: float = 0.0,
                 rates: tuple[float, float] = (0.0, 0.0)) -> list[LayerSetting]:
    """The settings of `--layer_profile` for a base: `auto_layer_profile` for "auto", else the file's, checked against the base.

    Args:
        mode, rank, alpha: of every block with "auto".
        rates: lr_init and lr_final with "auto", and if the file has none.

    Raises UserError like `read_layer_profile` and `adapter_shapes`, naming the file.
    """
    n_layer = _n_layer(base_weights)
    if layer_profile == "auto":
        return auto_layer_profile(n_layer, *rates, rank, alpha, mode)
    settings = read_layer_profile(layer_profile, n_layer, rates)
    adapter_shapes(settings, shapes_of(base_weights), f"layer profile {layer_profile}")
    return settings


def adapter_shapes(settings: list[LayerSetting], base: Mapping[str, tuple[int, ...]], where: str = "layer profile") -> Shapes:
    """Name and shape of every trained tensor, and of those that adapters keep, in the base's order.

    Args:
        settings: the profile.
        base: name and shape of the base's tensors, as in its checkpoint.
        where: names the profile at the beginning of messages.

    Raises:
        UserError: rows for another depth, a part that is in no tensor's name, a rank above a weight's smaller side, or nothing to
            train.
    """
    base = {name: shape for name, shape in base.items() if name not in UNREAD}
    n_layer = _n_layer(base)
    if [setting.layer for setting in settings] != all_layers(n_layer):
        raise UserError(f"{where}: does not have exactly the rows emb, 0 to {n_layer - 1}, head of a model of {n_layer} layers")
    _check_parts(settings, base, where)
    found: Shapes = {}
    by_layer = {setting.layer: setting for setting in settings}
    for name, shape in base.items():
        layer, local_name = layer_of(name)
        adapter = by_layer[layer].adapter(local_name) if is_linear(name) else None
        if adapter is not None:
            prefix, (out_features, in_features) = name.removesuffix(".weight"), shape
            check_rank(prefix, adapter, out_features, in_features, by_layer[layer], where)
            own = adapter.shapes(out_features, in_features, by_layer[layer].rank)
            found |= {f"{prefix}.{leaf}": shape for leaf, shape in own.items()}
        elif by_layer[layer].in_full(local_name):
            found[name] = shape
    for setting in settings:
        if setting.mode == "state" and not setting.rejects(f"att.{LEAF}"):
            found[f"blocks.{setting.layer}.att.{LEAF}"] = state_shape(base, setting.layer)
    if not found:
        raise UserError(f"{where}: it leaves nothing to train; give a layer a mode that trains, such as lora, or state for its "
                        "states, and do not reject all its parts")
    return found


def check_rank(name: str, adapter: type[AdaptedLinear], out_features: int, in_features: int, setting: LayerSetting,
               where: str = "layer profile") -> None:
    """Raise UserError if a rank is too high for the adapter of the linear layer `name`."""
    largest = adapter.largest_rank(out_features, in_features)
    if setting.rank > largest:
        raise UserError(f"{where}, layer {setting.layer}: rank {setting.rank} is too high for mode {setting.mode} and {name} "
                        f"({out_features} x {in_features}); choose one up to {largest}, with --lora_r or in the layer profile")


def _n_layer(names: Iterable[str]) -> int:
    return len({layer_of(name)[0] for name in names} - {"emb", "head"})


def _check_parts(settings: list[LayerSetting], base: Iterable[str], where: str) -> None:
    """A part may be absent from one layer (block 0 of v7 has no v0); a part that is nowhere in the model is a typo."""
    names = {layer_of(name)[1] for name in base}
    for setting in settings:
        trains = setting.mode != "freeze" or setting.full_parts
        rejected = [("RejectParts", part, names | {f"att.{LEAF}"}) for part in setting.reject_parts if trains]
        for column, part, known in rejected + [("FullParts", part, names) for part in setting.full_parts]:
            if not any(part in name for name in known):
                raise UserError(f"{where}, layer {setting.layer}: {column} names {part[:60]!r}, which is in no parameter's name; "
                                "write for example att.receptance, ffn.value or ln1")
