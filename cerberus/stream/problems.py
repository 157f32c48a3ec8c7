"""The current problems of consuming."""

import logging
from collections.abc import Mapping

from cerberus.telemetry import logs


class Problems(dict[str, str]):
    """A sentence for each problem, by its name.

    Args:
        log: Where a sentence is logged when it is new.
    """

    def __init__(self, log: logging.Logger) -> None:
        super().__init__()
        self._said = logs.Repeated(log)

    def tell(self, name: str, sentence: str | None) -> None:
        """Note a problem; None means that it is over."""
        if sentence is None:
            self.pop(name, None)
        else:
            self._said.warn(sentence, f"{name}_trouble")
            self[name] = sentence

    def tell_all(self, sentences: Mapping[str, str | None]) -> None:
        """Note several; see `tell`."""
        for name, sentence in sentences.items():
            self.tell(name, sentence)
