"""A folder conf/ where a command is started adds to ours: conf/data/NAME.yaml, conf/profile/NAME/paper.yaml."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OwnConfigs(SearchPathPlugin):
    """Searched after ours, which it cannot change."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path("conf").resolve()
        if own.is_dir():
            search_path.append("the current folder", f"file://{own}")
