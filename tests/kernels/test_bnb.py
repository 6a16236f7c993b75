"""What importing bitsandbytes through `kernels/bnb.py` leaves out, and leaves as it was."""

import subprocess
import sys


def test_no_compiler_is_imported_and_torch_keeps_its_own() -> None:
    code = (
        "import sys, torch; compile = torch.compile; from shoal.kernels.bnb import bitsandbytes, functional;"
        "assert torch.compile is compile; assert bitsandbytes.functional is functional;"
        "assert 'torch._dynamo' not in sys.modules; assert 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
