"""A process that replaces itself by its own command."""

import subprocess
import sys
import textwrap
from pathlib import Path

SCRIPT = """
    import os, subprocess, sys
    from pathlib import Path
    from shoal.node.peer.reviving import StartOver, reap, reviving
    from shoal.protocol.errors import AveragerEnded

    folder, lives = Path(sys.argv[1]), int(sys.argv[2])
    reap()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    with (folder / "lives").open("a") as file:
        file.write(f"{os.getpid()} {len(children)} {len(os.listdir('/proc/self/fd'))}\\n")

    def live():
        if len((folder / "lives").read_text().splitlines()) >= lives:
            return 7
        leaked = open(folder / "open", "w")
        child = subprocess.Popen(["true"])  # never waited for
        raise StartOver(AveragerEnded("the averager is gone"))

    sys.exit(reviving(live))
"""


def run(folder: Path, lives: int) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(lives)], capture_output=True, text=True, check=False
    )
    return done, [line.split() for line in (folder / "lives").read_text().splitlines()]


def test_it_starts_over_as_the_same_process_and_keeps_nothing(tmp_path: Path) -> None:
    done, lives = run(tmp_path, 4)
    assert done.returncode == 7, done.stderr
    assert len(lives) == 4
    assert len({process for process, _, _ in lives}) == 1
    assert {children for _, children, _ in lives} == {"0"}
    assert len({files for _, _, files in lives}) == 1


def test_after_too_many_times_it_ends_with_the_reason(tmp_path: Path) -> None:
    done, lives = run(tmp_path, 100)
    assert done.returncode == 1
    assert len(lives) == 4
    assert "AveragerEnded: the averager is gone" in done.stderr
