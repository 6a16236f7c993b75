"""`restart.py FOLDER LOG COMMAND...`: stop the peer of a data directory as a supervisor does, then start it again."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

STOP_SECONDS = 60.0


def stop(folder: Path) -> None:
    """SIGTERM to the peer that runs there, whoever its parent is; return when it has ended. TimeoutError if not."""
    descriptor = os.pidfd_open(json.loads((folder / "peer.json").read_text())["pid"])
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not select.select([descriptor], [], [], STOP_SECONDS)[0]:
            raise TimeoutError(f"the peer of {folder} does not end")
    finally:
        os.close(descriptor)


def main(folder: str, log: str, *command: str) -> None:
    stop(Path(folder))
    with open(log, "ab") as out:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
