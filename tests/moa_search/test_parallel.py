"""Processes that share a job, really started, talking through gloo."""

import pytest
import torch.multiprocessing as mp

from moa_search.errors import CalibrationError, ConfigError
from moa_search.parallel import ALONE, joined

COUNT = 3


def run_workers(work, tmp_path):
    """What ``work(workers)`` returns in each of three processes."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_worker, args=(rank, port, work, queue)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    return [results[rank] for rank in range(COUNT)]


def _worker(rank, port, work, queue):
    import os

    import torch.distributed as dist

    launched = {"RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launched.items()})
    with joined() as workers:
        result = work(workers)
    queue.put((rank, (result, dist.is_initialized())))


def _share(workers):
    def fail():
        if workers.rank == 1:
            raise CalibrationError("only here")

    try:
        workers.together(fail)
        error = "none"
    except CalibrationError as raised:
        error = str(raised)
    return {
        "everywhere": workers.everywhere(workers.rank * 10),
        "on_first": workers.on_first([workers.rank]),
        "from_first": workers.from_first(f"from {workers.rank}"),
        "own": list(workers.own(range(7))),
        "together": workers.together(lambda: workers.local_rank),
        "error": error,
    }


@pytest.mark.slow
def test_results_travel_and_an_error_of_one_is_raised_on_all(tmp_path):
    results = run_workers(_share, tmp_path)
    for rank, (result, still_joined) in enumerate(results):
        assert not still_joined
        assert result == {
            "everywhere": [0, 10, 20],
            "on_first": [[0], [1], [2]] if rank == 0 else [],
            "from_first": "from 0",
            "own": list(range(rank, 7, COUNT)),
            "together": rank,
            "error": "only here",
        }


def test_alone():
    assert _share(ALONE) == {
        "everywhere": [0],
        "on_first": [[0]],
        "from_first": "from 0",
        "own": list(range(7)),
        "together": 0,
        "error": "none",
    }
    assert list(ALONE.rounds([1, 2])) == [[1], [2]]


def test_without_a_launcher_one_works_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined() as workers:
        assert workers is ALONE


def test_processes_that_do_not_come(monkeypatch):
    """A launcher's variables of which one is no address."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "words"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="can't find each other"), joined():
        pass
