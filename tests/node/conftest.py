"""What the node's tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out, and `tiny` is beside the tests
