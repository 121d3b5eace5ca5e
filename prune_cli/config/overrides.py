"""Overrides as a user writes them: checked in our words, then put so that Hydra can compose them. Imports no torch.

A stage takes nodes of the root over whole (`granularity: ${granularity}` in stage/prune.yaml). What is set of such a node
for one stage alone (`prune.granularity.ratio=0.5`, `prune.criterion=l2`) goes to Hydra beneath a root of its own, `OWN`,
and onto the stage's copy of the node once the config is plain data (`settle`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prune_cli.config import option_files
from prune_cli.config.locations import GROUPS, options
from prune_cli.errors import LONGEST, ConfigError, nearest, shortened

OWN = "_own_"

SHARED = ("model", "dataset", "criterion", "granularity", "schedule", "distillation", "regulariser")
"""Groups whose option stands at the root, from where stages take it over; options of the others stand in each stage."""

FLAGS = ("-m", "--multirun", "--info", "-i", "--resolve", "--hydra-help")
VALUED = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p")  # Hydra's own, with a value behind them

HINTS = {"--dry-run": "; prune show recipe=NAME --estimate says what a run would do"}

_OVERRIDE = re.compile(r"(?P<sign>~|\+{0,2})(?P<key>[A-Za-z_][\w@/.:$-]*)(?:=(?P<value>.*))?", re.S)
_NAMES = re.compile(r"[A-Za-z_][\w./-]*(,[A-Za-z_][\w./-]*)*")


def check_words(arguments: Sequence[str], *, flags: bool = False) -> None:
    """Refuses what is no override, what names no option, and several values without a sweep.

    Args:
        flags: whether those of `prune run` may stand among them.

    Raises:
        ConfigError: what it is, and what would be right.
    """
    sweeping = flags and bool({"-m", "--multirun"} & set(arguments))
    for text in _overrides(arguments, flags):
        match = _OVERRIDE.fullmatch(text)
        if not match or (match["value"] is None and match["sign"] != "~"):
            hint = f"; did you mean recipe={text}?" if text in options("recipe") else ""
            raise ConfigError(
                f"{shortened(text)!r} is not an override{hint or '; write key=value, for example seed=1'}"
            )
        key, value = match["key"], match["value"] or ""
        if any(
            len(part) > LONGEST for part in re.split(r"[./@]", key)
        ):  # names of files end there, and Hydra looks for one
            raise ConfigError(f"{shortened(key)}: unknown key")
        if match["sign"] == "~" or key not in GROUPS:
            continue
        if value in ("", "null"):
            raise ConfigError(f"{key}={value}: needs the name of an option; see `prune list {key}`")
        if key == "stage":
            raise ConfigError("stage: which stages run, and in which order, is a list: stages=[train,prune,finetune]")
        if key not in (*SHARED, "recipe"):
            raise ConfigError(
                f"{key}={shortened(value)}: every stage has its own; give for example train.{key}={shortened(value)}"
            )
        if not _NAMES.fullmatch(value):
            continue  # a sweep by a function, a list, quotes: Hydra reads it
        known, names = options(key), value.split(",")
        for name in names:
            if name not in known:
                raise ConfigError(f"{key}={shortened(name)}: there is no such option{nearest(name, known)}")
        if len(names) > 1 and not sweeping:
            raise ConfigError(
                f"{key}={value}: several options are a sweep; give -m too: prune run -m ... {key}={value}"
            )


def _overrides(arguments: Sequence[str], flags: bool) -> Iterator[str]:
    """The arguments that are no flags.

    Raises:
        ConfigError: a flag that does not exist.
    """
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            yield word
        elif flags and word in VALUED:
            next(words, None)
        elif not flags or (word not in FLAGS and word.partition("=")[0] not in VALUED):
            there = nearest(word, FLAGS[:2]) if flags else ""
            raise ConfigError(f"there is no option {shortened(word)!r}{HINTS.get(word, there)}")


def for_hydra(arguments: Sequence[str], references: Sequence[str] = ()) -> list[str]:
    """The arguments as Hydra composes them.

    `STAGE.GROUP=NAME` chooses an option there, and what is set beneath a node that a stage takes over goes to `OWN`.

    Args:
        references: dotted paths of further nodes that are another one's whole, as `ft2` under `ft2: ${finetune}`.
    """
    return [_for_hydra(text, references) for text in arguments]


def _for_hydra(text: str, references: Sequence[str]) -> str:
    match = _OVERRIDE.fullmatch(text)
    if not match or match["value"] is None or match["sign"] == "~" or f"{OWN}." in match["key"]:
        return text
    key, value = match["key"], match["value"]
    if re.fullmatch(r"\w+!", value):  # as bf16!, which Hydra reads inside quotes alone
        return _for_hydra(f"{match['sign']}{key}='{value}'", references)
    group, at, package = key.partition("@")
    if at:
        own = group in SHARED and "." in package and package.rpartition(".")[2] == group
        return f"+{group}@{OWN}.{package}={value}" if own else text
    head, _, last = key.rpartition(".")
    if head and last in GROUPS and _NAMES.fullmatch(value) and set(value.split(",")) <= set(options(last)):
        return f"+{last}@{OWN}.{key}={value}" if last in SHARED else f"{last}@{key}={value}"
    parts = key.split(".")
    taken_over = set(SHARED) & set(parts[1:-1]) or (head and last in SHARED and value.startswith("{"))
    if parts[0] != "hydra" and (taken_over or any(key.startswith(f"{path}.") for path in references)):
        return f"++{OWN}.{key}={value}"
    return text


def as_written(text: str) -> str:
    """An override, or a message of Hydra's, as if nothing stood under `OWN`."""
    return re.sub(rf"\+*(\w+@)?{OWN}\.", r"\1", text)


def choices_of(choices: Mapping[Any, Any]) -> dict[str, str]:
    """The options that Hydra says were chosen, by group or `GROUP@PLACE`, with those of one stage at its place."""
    return {as_written(str(key)): str(value) for key, value in choices.items()}


def settle(content: dict[str, Any], overrides: Sequence[str], choices: Mapping[str, str]) -> None:
    """Puts what stands under `OWN` onto the nodes of a plain, resolved config, and takes `OWN` away.

    An option that is chosen for one stage keeps, like one that is chosen for all, the keys that the recipe or the command
    line set and that it has too.

    Args:
        overrides: as Hydra got them.
        choices: as `choices_of` gives them.
    """
    own = content.pop(OWN, None)
    if not isinstance(own, dict):
        return
    keys = {text.partition("=")[0].lstrip("+") for text in overrides}
    chosen = {key.partition(f"@{OWN}.")[2] for key in keys if f"@{OWN}." in key}
    whole = {key.removeprefix(f"{OWN}.") for key in keys if key.startswith(f"{OWN}.")}
    _settle(content, own, "", chosen, {key for key in whole if key.rpartition(".")[2] not in SHARED}, choices)


def _settle(
    node: dict[str, Any],
    own: Mapping[str, Any],
    path: str,
    chosen: set[str],
    whole: set[str],
    choices: Mapping[str, str],
) -> None:
    for key, value in own.items():
        place, there = f"{path}{key}", node.get(key)
        if place in chosen:
            node[key] = {**value, **_kept(there, place, whole, choices)}
        elif isinstance(value, dict) and isinstance(there, dict) and place not in whole:
            _settle(there, value, f"{place}.", chosen, whole, choices)
        else:
            node[key] = value


def _kept(shared: Any, place: str, whole: set[str], choices: Mapping[str, str]) -> dict[str, Any]:
    """What was set in the option of all stages and is a key of the one that is chosen at `place`, too."""
    group = place.rpartition(".")[2]
    if not isinstance(shared, dict):
        return {}
    before = option_files.content(f"{group}/{choices.get(group)}")
    known = option_files.keys(f"{group}/{choices.get(f'{group}@{place}')}")
    return {
        key: value
        for key, value in shared.items()
        if key in known
        and f"{place}.{key}" not in whole
        and not isinstance(value, dict)
        and (key not in before or before[key] != value)
    }
