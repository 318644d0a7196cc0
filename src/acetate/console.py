"""Writes lines to a terminal, which they cannot control."""

import logging
import os
import re
from typing import TextIO

from tqdm import tqdm

# but for tabs and the ends of lines; and what turns the direction of writing
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """Returns the text with \\xNN for what is not Unicode in a file's name, and for control codes:
    they could rewrite what a terminal shows."""
    plain = str(text)
    try:
        plain.encode()
    except UnicodeEncodeError:
        try:
            plain = os.fsencode(plain).decode(errors="backslashreplace")
        except UnicodeEncodeError:
            plain = plain.encode(errors="backslashreplace").decode()
    return CONTROL.sub(lambda code: ascii(code[0])[1:-1], plain)


class Console(logging.StreamHandler[TextIO]):
    """Writes lines above the bars that are being drawn, and marks warnings and errors as such."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno > logging.INFO:
                text = f"{record.levelname.lower()}: {text}"
            tqdm.write(printable(text), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)
