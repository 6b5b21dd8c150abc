"""From --template to a `Template`, and what files record of it and of --loss_on, so that later steps can compare."""

import json
import re
from pathlib import Path
from typing import Any

from src.checked_json import BadJson, Texts, parse_json
from src.console import short
from src.data.jinja_template import fingerprint_of, jinja_template
from src.data.templates import CLASSIC, LONGEST_STOPS, TEMPLATES, Ending, Template
from src.data.thinking import LOSS_ON
from src.errors import UserError
from src.tokenizer import Tokenizer

# What a sidecar records of a template.
RECORDED = {"name": str, "fingerprint": str, "stops": Texts(LONGEST_STOPS), "controls": Texts(LONGEST_STOPS), "opening": str,
            "collapses": bool, "lead?": str}
_G1 = re.compile(r"(?:^|[^a-z])g[01](?:[a-z][0-9]*)?(?:[^a-z0-9]|$)", re.IGNORECASE)
# Fields that every sidecar of a generated CSV has, and other files don't.
REJECTS = {"seed": int, "stop": (str, [str]), "template?": RECORDED}


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of a name, or of a file. Raises UserError for a file that has none, or that does not suit the tokenizer."""
    return TEMPLATES[name] if name in TEMPLATES else jinja_template(name, tokenizer)


def recorded(template: Template) -> dict[str, Any]:
    """What sidecars and adapters say about a template."""
    ending = template.ending
    return {"name": template.name, "fingerprint": template.fingerprint, "stops": list(ending.stops),
            "controls": list(ending.controls), "opening": ending.opening, "collapses": ending.collapses,
            **({"lead": ending.lead} if ending.lead else {})}


def recorded_in(sidecar: dict[str, Any] | None) -> dict[str, Any]:
    """The template that a sidecar records; files from before there were several are of `classic`."""
    found = (sidecar or {}).get("template")
    return found if isinstance(found, dict) else recorded(CLASSIC)


def loss_on_in(sidecar: dict[str, Any] | None) -> str:
    """The --loss_on that a sidecar records; in files from before there was one, whole answers have a loss."""
    return (sidecar or {}).get("loss_on", LOSS_ON[0])


def recorded_in_adapter(extra: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The "template" and "loss_on" that an adapter was trained with, as far as it says. Raises UserError if that is damaged."""
    found = {name: extra[name] for name in ("template", "loss_on") if name in extra}
    try:
        return parse_json(json.dumps(found), {"template?": RECORDED, "loss_on?": str})
    except BadJson as error:
        raise UserError(f"{path}: what it records of its training data is damaged ({error}); save it again") from None


def template_of_adapter(adapter: str | Path | None, trained: dict[str, Any]) -> str:
    """The --template for data that an adapter is used on. Raises UserError if it was trained with a file that is not there."""
    name = trained["template"]["name"] if "template" in trained else CLASSIC.name
    if name not in TEMPLATES and not Path(name).is_file():
        raise UserError(f"--template: the adapter {adapter} was trained with the chat template {name}, which is not there; give "
                        "its file")
    return name


def loss_on_of_adapter(adapter: str | Path | None, trained: dict[str, Any]) -> str:
    """The --loss_on for data that an adapter is used on. Raises UserError if it was trained with one that is unknown here."""
    loss_on = trained.get("loss_on", LOSS_ON[0])
    if loss_on not in LOSS_ON:
        raise UserError(f"--loss_on: the adapter {adapter} was trained with {short(loss_on)}, which is not one of "
                        f"{', '.join(LOSS_ON)}; give one of these")
    return loss_on


def ending_of(record: dict[str, Any]) -> Ending:
    return Ending(tuple(filter(None, record["stops"])), tuple(record["controls"]), record["opening"], record["collapses"],
                  record.get("lead", ""))


def difference(record: dict[str, Any], other: dict[str, Any]) -> str | None:
    """In words, that two recorded templates differ; None if they are the same."""
    if record["fingerprint"] == other["fingerprint"]:
        return None
    if record["name"] == other["name"]:
        return f"{record['name']}, which has changed since"
    return f"{record['name']}, not {other['name']}"


def check_template(name: str | None, record: dict[str, Any], path: str) -> None:
    """Raise UserError if a --template is given that is not the one recorded for the pairs in `path`."""
    if name is None:
        return
    fingerprint = TEMPLATES[name].fingerprint if name in TEMPLATES else fingerprint_of(name)
    if found := difference(record, {"name": name, "fingerprint": fingerprint}):
        raise UserError(f"--template {name}: {path} was prepared with --template {found}; leave the flag out, or prepare it "
                        "again")


def check_loss_on(loss_on: str | None, found: str, path: str) -> None:
    """Raise UserError if a --loss_on is given that is not the one that the pairs in `path` were prepared with."""
    if loss_on not in (None, found):
        raise UserError(f"--loss_on {loss_on}: {path} was prepared with --loss_on {short(found)}; leave the flag out, or prepare "
                        "it again")


def model_note(checkpoint: str | None, used: dict[str, Any]) -> list[str]:
    """A line where a checkpoint is a G1 model by its name, or by that of its folder, and the template used is `classic`."""
    if checkpoint is None or difference(used, recorded(CLASSIC)):
        return []
    folder = Path(checkpoint).absolute().parent.name
    if _G1.search(Path(checkpoint).name):
        whose = "its name"
    elif _G1.search(folder) and "rwkv" in folder.lower():  # a folder may be called g1 for any reason
        whose = "its folder's name"
    else:
        return []
    return [f"note: {checkpoint} is a G1 model by {whose}, and --template classic is not what G1 models are trained on; "
            "--template g1 (or g1-think, g1-fakethink) is, see docs/templates.md"]


def adapter_notes(adapter: str | Path | None, trained: dict[str, Any], template: dict[str, Any], loss_on: str) -> list[str]:
    """A line each where the adapter was trained with another template, or another --loss_on, than the data have now."""
    found = difference(template, trained["template"]) if "template" in trained else None
    lines = [f"warning: the data are in another --template than the adapter {adapter} was trained with: {found}"] if found else []
    if (trained_on := trained.get("loss_on", loss_on)) != loss_on:
        lines.append(f"warning: the data have another --loss_on than the adapter {adapter} was trained with: {short(loss_on)}, "
                     f"not {short(trained_on)}")
    return lines


def rejects_note(path: str, template: Template) -> list[str]:
    """A line where the sidecar of a generated CSV says that its rejects were written under another template."""
    try:
        sidecar = parse_json(Path(f"{path}.json").read_bytes(), REJECTS)
    except (OSError, BadJson):
        return []  # not of reject generation
    found = difference(recorded_in(sidecar), recorded(template))
    return [f"warning: {path}: its rejects were written under --template {found}; with another template than in generation the "
            "model rejects what it would not write"] if found else []
