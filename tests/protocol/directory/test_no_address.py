"""A machine that has no address of the kind that a node is to listen at, as where IPv6 is switched off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a network namespace of its own nothing is up, not even loopback.
ALONE = ["unshare", "--map-root-user", "--net"]
PROGRAM = """
import sys
from pathlib import Path
from shoal.protocol.directory.dht import start_dht, visible_addresses
dht = start_dht(
    Path(sys.argv[1]), initial_peers=[], host="::", port=0, announce=[], run_id="demo-0123456789ab", founder=True
)
try:
    visible_addresses(dht)
except Exception as error:
    print(type(error).__name__, error)
finally:
    dht.shutdown()
"""


def test_a_node_that_nobody_can_dial_says_so(tmp_path: Path) -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may make no network namespaces")
    command = [*ALONE, sys.executable, "-c", PROGRAM, str(tmp_path / "key")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "DirectoryError the node listens where nobody can dial it" in done.stdout
