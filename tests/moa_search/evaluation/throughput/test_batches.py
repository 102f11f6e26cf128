import pytest
import torch

from moa_search.evaluation.throughput import Way, batches
from moa_search.evaluation.throughput.batches import Probe, largest_batch
from moa_search.evaluation.throughput.running import Run


@pytest.mark.parametrize("most", [1, 2, 7, 64, 100])
def test_the_largest_batch_is_found_with_few_trials(most):
    for limit in range(most + 3):
        tried = []

        def fits(batch, limit=limit, tried=tried):
            tried.append(batch)
            return batch <= limit

        assert largest_batch(fits, most) == min(limit, most)
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1
        assert max(tried) <= max(2 * limit, 1)


class TestProbe:
    @pytest.fixture
    def probe(self, monkeypatch, tiny_model):
        """A probe whose runs take a hundred bytes per sample over what was in use, and fail over 20 samples."""
        tried = []

        def run_once(model, way, ids, decode_tokens, *, compiled):
            assert not compiled
            tried.append(len(ids))
            if len(ids) > 20:
                raise torch.OutOfMemoryError
            return Run(1.0, 1.0, 1.0, 1, probe._peaks[0] + 100 * len(ids))

        monkeypatch.setattr(batches, "run_once", run_once)
        probe = Probe(tiny_model[0], Way("dense", "dense"), 16, 2, limit_bytes=None)
        probe.tried = tried
        return probe

    def test_memory_that_runs_out_is_no_fit(self, probe):
        assert largest_batch(probe) == 20
        assert max(probe.tried) == 32

    def test_a_batch_that_is_forecast_above_the_limit_is_never_run(self, probe):
        probe.limit_bytes = probe._peaks[0] + 1150
        assert largest_batch(probe) == 11
        assert max(probe.tried) == 11

    def test_a_peak_above_the_limit_is_no_fit_whatever_the_forecast(self, probe):
        probe.limit_bytes = probe._peaks[0] + 50
        assert largest_batch(probe) == 0
        assert probe.tried == [1]
