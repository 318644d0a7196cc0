"""Writes lines of a run to a terminal."""

import logging
from typing import TextIO

from tqdm import tqdm


class Console(logging.StreamHandler[TextIO]):
    """Writes lines above the bars that are being drawn, and marks warnings and errors as such."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno > logging.INFO:
                text = f"{record.levelname.lower()}: {text}"
            tqdm.write(text, file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)
