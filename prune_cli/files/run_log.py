"""run.log, which says once that it cannot be written and then leaves the run alone."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path


class RunLog(logging.FileHandler):
    """Lines of a run with their times.

    Where one cannot be written, as on a full disk, Python's own handler would print a traceback for each: this one ends.

    Args:
        path: of the file, in a folder that is there.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.setLevel(logging.DEBUG)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        self.close()
        logging.getLogger("prune_cli").warning("%s ends here: %s", self.baseFilename, error.strerror or error)

    def close(self) -> None:
        with suppress(OSError):  # what is left in its buffer
            super().close()
