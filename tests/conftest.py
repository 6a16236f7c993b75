"""What all tests share."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # at once: it looks for who refers to what it registers, which frozen objects hide
import pytest
from shoal.node.logs import THIRD_PARTIES

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out, and `prometheus_server` is here

hypothesis.settings.register_profile("shoal", deadline=None)  # an example may wait for the machine's other work
hypothesis.settings.load_profile("shoal")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that run in this process set up logging, onto a captured stream that ends with their test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in THIRD_PARTIES}
    yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)
