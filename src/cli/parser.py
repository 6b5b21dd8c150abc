"""The parser of every script: a wrong flag fails with one line, and one line names the flags that have no effect."""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from src.errors import UserError
from src.settings import NEEDED, flags_of
from src.values import Reader


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Collected(argparse.Action):
    """Collects the values of a flag that may be given several times in a tuple."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), values))


class Parser(argparse.ArgumentParser):
    """argparse over dataclasses of settings (src/settings.py); it takes no abbreviations and reports a wrong flag in one line."""

    def __init__(self, description: str, *settings: type, epilog: str | None = None):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Help, epilog=epilog)
        # Words that are values although they begin with a dash: argparse's own pattern misses -1e-3 and -inf.
        self._negative_number_matcher = re.compile(r"-(\.?[0-9]|inf|nan)")
        groups: dict[str | None, argparse._ActionsContainer] = {None: self}
        self.named = [named for one in settings for named in flags_of(one)]
        for name, flag, title in self.named:
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            takes: dict[str, Any] = {"type": flag.read} if isinstance(flag.read, Reader) else {"choices": flag.read}
            if flag.repeats:
                takes["action"] = _Collected
            groups[title].add_argument(f"--{name}", required=flag.default is NEEDED, default=flag.shown_default, help=flag.help,
                                       **takes)

    def flags(self) -> set[str]:
        return {flag for action in self._actions for flag in action.option_strings}

    def given(self, arguments: Sequence[str]) -> Counter[str]:
        """The flags of a parsed command, in its order, and how often each occurs; those that may repeat count once."""
        own = self.flags()
        found = Counter(flag for word in arguments if (flag := word.partition("=")[0]) in own)
        repeat = {f"--{name}" for name, flag, _ in self.named if flag.repeats}
        return Counter({flag: 1 if flag in repeat else count for flag, count in found.items()})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class NoEffect(NamedTuple):
    """A rule of a script: where it holds, these flags change nothing in the run."""

    flags: str  # names without dashes, separated by spaces
    holds: bool
    reason: str


def notes(given: Counter[str], rules: Iterable[NoEffect], mentions: Counter[str] | None = None) -> tuple[str, ...]:
    """Lines for stderr on flags without effect, and on flags that are given more than once.

    A flag that is given with its default counts too. The first rule that holds for a flag is its reason.

    Args:
        mentions: how often each flag was in the command before translation; counts where it is more than in `given`.
    """
    named: set[str] = set()
    reasons: dict[str, list[str]] = {}
    for rule in rules:
        for flag in map("--{}".format, rule.flags.split()):
            if rule.holds and flag in given and flag not in named:
                named.add(flag)
                reasons.setdefault(rule.reason, []).append(flag)
    lines = []
    if reasons:
        lines.append("note: no effect: " + "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in reasons.items()))
    repeated = [f"{flag} ({count} times)" for flag, count in (given | (mentions or Counter())).items() if count > 1]
    if repeated:
        lines.append(f"note: given more than once, the last one counts: {', '.join(repeated)}")
    return tuple(lines)
