"""How lines of a run reach a terminal."""

import logging

from tqdm import tqdm


class Console(logging.StreamHandler):
    """Lines above the bars that are being drawn; a warning or an error says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno > logging.INFO:
                text = f"{record.levelname.lower()}: {text}"
            tqdm.write(text, file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)
