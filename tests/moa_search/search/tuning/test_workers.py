"""Worker processes: each its device, and one that ends badly doesn't end the others."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moa_search.errors import ConfigError
from moa_search.search.tuning.workers import run_workers
from tests.moa_search.search.tuning import tuning_helpers

INTERRUPTED = """
import sys
from pathlib import Path
from moa_search.search.tuning.workers import run_workers
from tests.moa_search.search.tuning import tuning_helpers
if __name__ == "__main__":
    run_workers(2, tuning_helpers.wait_to_be_interrupted, [Path(sys.argv[1])])
"""


def test_each_has_its_device_and_all_are_waited_for(tmp_path, capfd):
    looks = []
    fates = run_workers(3, tuning_helpers.end_somehow, [tmp_path], ["cuda:0", "cuda:1"], watch=lambda: looks.append(1))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "cuda:0", "1": "cuda:1", "2": "cuda:0"}
    assert fates == ["worker 1 ended with an error", "worker 2 was killed by SIGKILL"]
    assert looks
    assert capfd.readouterr().err.strip() == "worker 1: made up"


def test_no_workers_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        run_workers(0, tuning_helpers.end_somehow)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_first_process(tmp_path, sent):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    while len(list(tmp_path.glob("waiting-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    assert sent == signal.SIGKILL or b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("interrupted-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stderr.close()
    process.wait()
