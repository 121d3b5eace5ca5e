"""Recipes on disk, the schema of the root config, and composition errors as one line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_cli.config import option_files, trial
from prune_cli.config import overrides as words
from prune_cli.config.locations import GROUPS, options, searchpath, shipped
from prune_cli.errors import ConfigError, first_line, nearest, shortened
from prune_cli.reading import read_text


def require_recipe(overrides: list[str]) -> None:
    """Checks `recipe=` before Hydra makes an output folder.

    Raises:
        ConfigError: no recipe, or one that does not exist; names the nearest.
    """
    chosen = [value.split("=", 1)[1] for value in overrides if value.startswith("recipe=")]
    if not chosen:
        raise ConfigError("which recipe? give recipe=NAME, for example recipe=quickstart (see `prune list recipe`)")
    known = options("recipe")
    for name in _sweep_values(chosen[-1]):
        if name not in known:
            raise ConfigError(f"there is no recipe {shortened(name)!r}{nearest(name, known)}")
        _require_package(known[name])


def _require_package(path: Path) -> None:
    """Refuses a recipe whose keys would not be those of the root, but of a node `recipe`."""
    if not any(re.match(r"#\s*@package\s+_global_\s*$", line) for line in read_text(path, ConfigError).splitlines()):
        raise ConfigError(f"{path}: the first line of a recipe must be '# @package _global_'")


def _sweep_values(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if "(" not in text else []


def hydra_arguments(overrides: list[str]) -> list[str]:
    """The overrides plus the stages that they or their recipes name, and the user's recipe folders as Hydra's search path,
    unless one was given."""
    from prune_cli.config.sources import guard

    guard()
    overrides = [*words.for_hydra(overrides, _references(overrides)), *_named_stages(overrides)]
    folders = searchpath()
    if not folders or any(text.startswith("hydra.searchpath=") for text in overrides):
        return overrides
    return [*overrides, "hydra.searchpath=[" + ",".join(quoted(f"file://{folder}") for folder in folders) + "]"]


def _named_stages(overrides: list[str]) -> list[str]:
    """Choices of the stages that `config.yaml` leaves out, for those that a recipe or an override names anywhere.

    Composing all of them for every job would take longer than all the rest.
    """
    optional = re.findall(r"^  - stage@(\w+): null", read_text(shipped() / "config.yaml", ConfigError), re.M)
    given = {text.partition("=")[0] for text in overrides}
    words = {word for text in [*overrides, *_recipe_lines(overrides)] for word in re.findall(r"\w+", text)}
    return [f"stage@{name}={name}" for name in optional if name in words and f"stage@{name}" not in given]


def _recipe_lines(overrides: list[str]) -> Iterator[str]:
    """Lines of the recipes' files without comments; what is wrong with a file is said when it is composed."""
    for name in [name for text in overrides if text.startswith("recipe=") for name in _sweep_values(text[7:])]:
        try:
            for path in option_files.files(f"recipe/{name}"):
                yield from (line.split("#")[0] for line in read_text(path, ConfigError).splitlines())
        except (ConfigError, RecursionError):  # defaults in a circle
            continue


def _references(overrides: list[str]) -> list[str]:
    """The nodes of a recipe that are another one's whole."""
    import yaml

    found = option_files.Comments()
    for name in [name for text in overrides if text.startswith("recipe=") for name in _sweep_values(text[7:])]:
        try:
            for path in option_files.files(f"recipe/{name}"):
                found.read(path, "")
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
    return list(found.same)


def quoted(text: str) -> str:
    """A string that Hydra's grammar of overrides reads as it is, whatever characters a path has."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", text) + "'"


@dataclass(frozen=True)
class Composed:
    """A composed config as plain, resolved data, and the option that was chosen in each group."""

    config: dict[str, Any]
    choices: dict[str, str]


def compose(overrides: list[str]) -> Composed:
    """Composes a config outside `prune run`.

    Raises:
        ConfigError: anything that does not compose, in one line.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    words.check_words(overrides)
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    given = hydra_arguments(overrides)
    try:
        with hydra.initialize_config_dir(str(shipped()), version_base="1.3"):
            config = hydra.compose("config", given, return_hydra_config=True)
        choices = words.choices_of(config.hydra.runtime.choices)
        return Composed(plain(config, given, choices), choices)
    except Exception as error:
        raise translate(error, overrides) from error


def plain(config: Any, overrides: list[str], choices: Mapping[str, str]) -> dict[str, Any]:
    """A composed config as plain, resolved data, without `hydra` and without keys that no longer apply.

    Where the command line chooses another option of a group than the recipe, keys that the recipe set for its own
    option would be unknown to the new one (`schedule=one_shot` under a recipe with `schedule.retrain_epoch`); those
    that the new option's files do not have, and the command line does not set, are dropped. Then comes what is set for
    one stage alone (`overrides.settle`), and under `limit_batches` what makes it a trial (`trial.cut`).

    Args:
        overrides: as Hydra got them.
        choices: as `overrides.choices_of` gives them.
    """
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    given = {text.split("=", 1)[0].lstrip("+").rpartition("@")[2] for text in overrides}  # of GROUP@PACKAGE the package
    with open_dict(config):
        config.pop("hydra", None)
        for text in overrides:
            match = re.fullmatch(r"(\w+)(?:@([\w.]+))?=([\w/.-]+)", text)
            if not match or match.group(1) not in GROUPS or match.group(1) == "recipe":
                continue
            group, package, name = match.groups()
            node = OmegaConf.select(config, package or group)
            if not OmegaConf.is_dict(node) or name not in options(group):
                continue
            known = option_files.keys(f"{group}/{name}")
            for key in [str(key) for key in node]:
                prefix = f"{package or group}.{key}"
                set_here = any(name == prefix or name.startswith(prefix + ".") for name in given)
                if key not in known and not set_here and group != "stage":  # stages get more keys from their defaults
                    del node[key]
    try:
        content: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise translate(error, overrides) from error
    words.settle(content, overrides, choices)
    trial.cut(content, choices, {words.as_written(text.split("=", 1)[0]).lstrip("+") for text in overrides})
    return content


def translate(error: Exception, overrides: list[str]) -> Exception:
    """A composition error of Hydra, OmegaConf or YAML as a ConfigError of one line; other errors as they are."""
    module = type(error).__module__
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        numbers = [
            key for key, _, value in (text.partition("=") for text in overrides) if not re.search("[a-zA-Z]", value)
        ]
        named = [key for key in numbers if key in GROUPS] or [*numbers, "a group"]
        return ConfigError(f"{shortened(named[0])}: options have names; see `prune list`")
    if module.startswith("yaml."):
        return ConfigError(f"a recipe file is no YAML: {' '.join(str(error).split())}")
    if not module.startswith(("hydra.", "omegaconf.")):
        return error
    text = words.as_written(str(error))
    if match := re.search(r"Could not (?:find|load) '([\w./-]+)/([^'/]+)'", text):
        group, name = match.groups()
        return ConfigError(f"{group}={shortened(name)}: there is no such option{nearest(name, options(group))}")
    if match := re.search(r"Could not delete(?: from config)?[.:]? '?([^' ]+)'?", text):
        return ConfigError(f"~{match.group(1)}: there is no such key or choice to take away")
    if match := re.search(r"config group '([^']*)' does not exist", text):
        return ConfigError(
            f"{shortened(match.group(1))}: there is no such group of options{nearest(match.group(1), GROUPS)}"
        )
    if match := re.search(r"Interpolation key '([^']*)' not found.*?full_key: (\S+)", text, re.S):
        return ConfigError(f"{match.group(2)}: there is no key {match.group(1)!r} to take the value from")
    if match := re.search(r"Ambiguous value for argument '([^']*)'", text):
        key, _, value = match.group(1).partition("=")
        return ConfigError(
            f"{key}={shortened(value)}: several values are a sweep, which needs -m; a list is written {key}=[{shortened(value)}]"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        if "@" not in key and "/" not in key:
            return ConfigError(f"{key}: unknown key{_nearest_key(key, overrides)}")
        return ConfigError(f"{key}: there is no such group in the defaults{nearest(key, GROUPS)}")
    if type(error).__name__ == "OverrideParseException" or text.startswith("Error parsing override"):
        wrong = shortened(words.as_written(getattr(error, "override", "") or text.splitlines()[0]))
        return ConfigError(
            f"{wrong!r}: the value cannot be read; put what has spaces, commas, brackets or quotes inside quotes: "
            "'key=\"a b\"', and lists as 'key=[a,b]'"
        )
    if match := re.search(r"Error merging override ([^=\s]+)=", text):
        reason = first_line(error.__cause__) if error.__cause__ else ""
        if "Cannot merge" in reason:
            reason = "a list is written [a,b], a mapping {key: value}"
        return ConfigError(
            f"{match.group(1).lstrip('+')}: the value is of another kind than in the recipe{reason and ': ' + reason}"
        )
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return ConfigError(f"{match.group(1)}: needs a value; give {match.group(1)}=...")
    return ConfigError(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def _nearest_key(key: str, overrides: list[str]) -> str:
    """Suggests dotted keys near one that Hydra refused, from the config without the offending override."""
    kept = [text for text in overrides if not text.lstrip("+~").startswith(key)]
    try:
        config = compose([text for text in kept if "hydra." not in text]).config
    except ConfigError:
        return ""
    names = list(_dotted(config))
    depth = key.count(".")
    return nearest(key, [name for name in names if name.count(".") == depth] or names)


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield prefix + str(name)
            yield from _dotted(value, f"{prefix}{name}.")
