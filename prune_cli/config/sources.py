"""How Hydra reads config files: through the same bounds as everything else. Imports Hydra."""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from prune_cli.config.locations import shipped
from prune_cli.errors import ConfigError
from prune_cli.reading import read_yaml, shown


class Folder(FileConfigSource):
    """A folder of config files, of which a user's own are looked at before Hydra follows their aliases."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if path.exists() and not path.is_relative_to(shipped()):
            content = read_yaml(path, ConfigError)
            if content is not None and not isinstance(content, dict):
                raise ConfigError(f"{path} holds {shown(content)}; a recipe or option is a mapping of keys to values")
        return super().load_config(config_path)


def guard() -> None:
    """Makes Hydra refuse, in one line, files that are damaged, out of bounds or no mapping."""
    Plugins.instance()  # registers Hydra's own source of files, whose place ours takes
    SourcesRegistry.instance().types["file"] = Folder
