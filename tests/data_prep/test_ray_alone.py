"""Ray that a command starts for itself is for this machine alone."""

import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("ray")]
PROGRAM = """
from contextlib import suppress
import psutil, ray
from data_prep.on_ray import start_ray
from data_prep.executor import parallel

if __name__ == "__main__":
    assert list(parallel(abs, [-1, -2], executor="ray", workers=1)) == [1, 2]
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # workers come and go
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    print("listens", one.laddr.ip.removeprefix("::ffff:"), process.name())
"""


def test_ray_listens_on_loopback_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("listens")]
    assert {"raylet", "gcs_server"} <= {name for _, name in found}
    assert {ip for ip, _ in found} == {"127.0.0.1"}, found
