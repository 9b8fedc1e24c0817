from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from finedetr.train.interrupt import Interruption


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.requested == 0
        signal.raise_signal(number)
        assert interruption.requested == number
    error = interruption.error("go on with --resume")
    assert (error.exit, error.code, error.hint) == (status, "run.interrupted", "go on with --resume")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_second_signal_exits_at_once(name: str, status: int) -> None:
    code = (
        "import signal\nfrom finedetr.train.interrupt import Interruption\nwith Interruption():\n"
        f"  signal.raise_signal(signal.{name})\n  signal.raise_signal(signal.{name})\n  print('late')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "")
