import pytest
import torch

from moa_search.errors import VerificationError
from moa_search.evaluation.throughput import Way, batches, made_up_plan, make_ways, measure, measuring
from moa_search.evaluation.throughput.memory import PeakMemory
from moa_search.evaluation.throughput.running import UNTIMED_STEPS, Run
from moa_search.formats import ModelSignature


@pytest.fixture
def plan(tiny_model):
    return made_up_plan(ModelSignature.of(tiny_model[0].config), 0.5)


def test_every_cell_is_timed_and_the_model_left_alone(tiny_model, plan, bars):
    model = tiny_model[0]
    before = (model.generation_config, model.config._attn_implementation, {*vars(model)})
    kept = []
    found = measure(
        model,
        make_ways(("dense", "plan"), {"half": plan}),
        lengths=[64, 512],
        batches=[1, 3],
        decode_tokens=6,
        repetitions=2,
        keep=kept.append,
    )
    cells = found.runs.groupby(["variant", "length", "batch"], sort=False).size()
    assert cells.to_dict() == {(w, n, b): 2 for w in ("dense", "half") for n in (64, 512) for b in (1, 3)}
    assert (found.runs[["prefill_ms", "decode_ms", "peak_bytes"]] > 0).all().all()
    assert bars["Timing"][-1] == (6, 6)
    assert [len(part.runs) for part in kept] == [8, 16]
    assert (model.generation_config, model.config._attn_implementation, {*vars(model)}) == before
    assert {"device", "torch", "transformers", "dtype"} <= {*found.facts}
    assert found.facts["plan_attention"].startswith(("cpu: vectors of", "torch", "triton"))
    stored = 512 + UNTIMED_STEPS + 6  # the last token is never stored
    by_way = found.runs[(found.runs["length"] == 512) & (found.runs["batch"] == 3)].set_index("variant")["cache_bytes"]
    assert set(by_way["dense"]) == {3 * 2 * 2 * 2 * stored * 8 * 4}
    heads = 2 * 2
    predicted = plan.kv_bytes(stored, batch=3, bytes_per_element=4)
    a_block_per_head = 3 * 2 * heads * plan.block * 8 * 4
    assert predicted <= by_way["half"].max() <= predicted + a_block_per_head


def test_largest_batches_and_plans_at_those_of_dense(tiny_model, plan, monkeypatch):
    most = {"dense": 2, "half": 4}
    monkeypatch.setattr(measuring, "_largest", lambda model, way, *rest: most[way.name])
    found = measure(
        tiny_model[0],
        make_ways(("dense", "plan"), {"half": plan}),
        lengths=[64],
        batches=["largest", 4],
        decode_tokens=2,
        repetitions=1,
    )
    cells = found.runs[["variant", "batch", "is_largest"]].sort_values(["variant", "batch"]).values.tolist()
    assert cells == [["dense", 2, True], ["dense", 4, False], ["half", 2, False], ["half", 4, True]]


def test_a_compiled_way_gives_up_samples_that_only_fit_uncompiled(tiny_model, monkeypatch):
    def run_once(model, way, ids, decode_tokens, *, compiled=True):
        if len(ids) > (18 if compiled else 20):
            raise torch.OutOfMemoryError
        return Run(1.0, 1.0, 1.0, 1, None)

    monkeypatch.setattr(batches, "run_once", run_once)
    assert measuring._largest(tiny_model[0], Way("dense", "dense"), 8, 2, None) == 20
    assert measuring._largest(tiny_model[0], Way("dense-static", "dense-static"), 8, 2, None) == 18


def test_graphs_make_room_for_another_ways_largest_batch(tiny_model, plan, monkeypatch):
    freed, ran = [], []

    def run_once(model, way, ids, decode_tokens):
        ran.append(way.name)
        if way.name == "half" and not freed:
            raise torch.OutOfMemoryError
        return Run(1.0, 1.0, 1.0, 1, None)

    monkeypatch.setattr(measuring, "run_once", run_once)
    monkeypatch.setattr(measuring, "forget_compiled", lambda model: freed.append(len(ran)) if ran else None)
    ways = make_ways(("dense", "plan"), {"half": plan})
    found = measure(tiny_model[0], ways, lengths=[64], batches=[1], decode_tokens=2, repetitions=1)
    assert (ran, freed) == (["dense", "half", "half", "dense", "half"], [2])
    assert len(found.runs) == 2


def test_nothing_is_timed_on_a_red_gate(tiny_model, plan, monkeypatch):
    def broken(model, way, seed):
        raise VerificationError(way.name)

    monkeypatch.setattr(measuring, "verify", broken)
    monkeypatch.setattr(measuring, "run_once", lambda *args: pytest.fail("timed"))
    with pytest.raises(VerificationError, match="half"):
        measure(tiny_model[0], [Way("half", "plan", plan)], lengths=[64], batches=[1], decode_tokens=2, repetitions=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler meets its own
def test_compiled_ways_compile_and_their_caches_hold_the_whole_run(tiny_model, plan):
    torch._dynamo.utils.counters.clear()
    found = measure(
        tiny_model[0],
        make_ways(("dense-static", "plan-static"), {"half": plan}),
        lengths=[200],
        batches=[2],
        decode_tokens=4,
        repetitions=1,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert [gate.variant for gate in found.gates] == ["half static"]
    tokens = 200 + 1 + UNTIMED_STEPS + 4
    by_kind = found.runs.set_index("kind")["cache_bytes"]
    assert by_kind["dense-static"] == 2 * 2 * 2 * 2 * tokens * 8 * 4
    assert by_kind["plan-static"] < 0.75 * by_kind["dense-static"]


def test_peaks_rise_with_what_is_allocated_and_start_again():
    device = torch.device("cpu")
    with PeakMemory(device) as idle:
        pass
    with PeakMemory(device) as busy:
        torch.ones(2**24).sum()  # 64 MiB
    with PeakMemory(device) as again:
        pass
    assert 60 * 2**20 < busy.peak_bytes - idle.peak_bytes < 90 * 2**20
    assert abs(again.peak_bytes - idle.peak_bytes) < 20 * 2**20
