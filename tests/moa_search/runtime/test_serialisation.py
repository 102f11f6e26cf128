"""A model under a plan, written and read by whatever can: under the same plan afterwards, in any process."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import cloudpickle
import joblib
import pytest
import torch
from transformers import DynamicCache

from moa_search.runtime import MoACache, apply_plan, remove_plan

from .explicit import tiny_model, tiny_plan, tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


def by_torch(thing, folder):
    torch.save(thing, folder / "thing.pt")
    return torch.load(folder / "thing.pt", weights_only=False)


def by_joblib(thing, folder):
    joblib.dump(thing, folder / "thing.joblib")
    return joblib.load(folder / "thing.joblib")


TRIPS = {
    "pickle": lambda thing, _: pickle.loads(pickle.dumps(thing)),
    "pickle protocol 2": lambda thing, _: pickle.loads(pickle.dumps(thing, protocol=2)),
    "pickle in pure Python": lambda thing, _: pickle._loads(pickle._dumps(thing)),
    "cloudpickle": lambda thing, _: cloudpickle.loads(cloudpickle.dumps(thing)),
    "joblib": by_joblib,
    "torch.save": by_torch,
    "deepcopy": lambda thing, _: copy.deepcopy(thing),
}


def generate(model, **options):
    return model.generate(tokens(2, 60), **GREEDY, **options)


def planned(**changes):
    model = tiny_model(**changes)
    return apply_plan(model, tiny_plan(model))


@pytest.mark.parametrize("trip", TRIPS)
def test_a_model_comes_back_under_its_plan_and_on_its_own(trip, tmp_path):
    model = planned()
    expected = generate(model).sequences
    twin = TRIPS[trip](model, tmp_path)
    result = generate(twin)
    assert torch.equal(result.sequences, expected)
    assert type(result.past_key_values) is MoACache
    assert type(twin(tokens(1, 5)).past_key_values) is MoACache
    assert generate(twin, cache_implementation="static").past_key_values.is_compileable
    assert twin._prefill.__self__ is twin
    # What is done to one doesn't reach the other.
    apply_plan(twin, tiny_plan(twin, shift=1))
    assert not torch.equal(generate(twin).sequences, expected)
    assert torch.equal(generate(model).sequences, expected)
    dense = generate(remove_plan(twin))
    assert type(dense.past_key_values) is DynamicCache
    assert torch.equal(dense.sequences, generate(tiny_model()).sequences)
    assert torch.equal(generate(model).sequences, expected)


def test_a_shallow_copy_shares_its_parts_and_so_its_plan():
    model = planned()
    expected = generate(model).sequences
    twin = copy.copy(model)
    result = generate(twin)
    assert torch.equal(result.sequences, expected)
    assert type(result.past_key_values) is MoACache
    remove_plan(twin)
    assert type(generate(model).past_key_values) is DynamicCache
    assert type(generate(twin).past_key_values) is DynamicCache
    apply_plan(model, tiny_plan(model))
    assert torch.equal(generate(model).sequences, expected)
    assert type(model(tokens(1, 5)).past_key_values) is MoACache


def test_a_fresh_process_reads_it_without_importing_anything_first(tmp_path):
    model = planned()
    torch.save(model, tmp_path / "model.pt")
    torch.save(generate(model).sequences, tmp_path / "expected.pt")
    program = (
        "import torch, sys\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "result = model.generate(expected[:, :60], max_new_tokens=12, do_sample=False, return_dict_in_generate=True)\n"
        "print(type(result.past_key_values).__name__, torch.equal(result.sequences, expected))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MoACache", "True"], done.stderr


SPAWNING = """
import multiprocessing, sys, torch

def work(model, prompt, results):
    result = model.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    results.put((type(result.past_key_values).__name__, result.sequences.tolist()))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
    expected = torch.load(sys.argv[1] + "/expected.pt")
    worker = context.Process(target=work, args=(model, expected[:, :60], results))
    worker.start()
    kind, sequences = results.get(timeout=240)
    worker.join()
    print(kind, sequences == expected.tolist())
"""


def test_a_spawned_worker_gets_it(tmp_path):
    model = planned()
    torch.save(model, tmp_path / "model.pt")
    torch.save(generate(model).sequences, tmp_path / "expected.pt")
    (tmp_path / "spawning.py").write_text(SPAWNING)
    command = [sys.executable, str(tmp_path / "spawning.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["MoACache", "True"], done.stderr


@pytest.mark.parametrize("max_length", [None, 128], ids=["growing", "fixed"])
@pytest.mark.parametrize("trip", TRIPS)
def test_a_cache_comes_back_whole_and_on_its_own(trip, max_length, tmp_path):
    model = planned()
    sequence = tokens(2, 90)
    cache = MoACache(model.config, tiny_plan(model), max_length=max_length)
    with torch.no_grad():
        model(sequence[:, :70], past_key_values=cache)
        twin = TRIPS[trip](cache, tmp_path)
        expected = model(sequence[:, 70:], past_key_values=cache).logits
        assert torch.equal(model(sequence[:, 70:], past_key_values=twin).logits, expected)
        further = model(sequence[:, :1], past_key_values=twin).logits
        assert torch.equal(model(sequence[:, :1], past_key_values=cache).logits, further)


def test_room_for_rollbacks_is_kept_with_the_cache():
    model = planned()
    cache = MoACache(model.config, tiny_plan(model))
    cache.activate_past_recording(100)
    twin = pickle.loads(pickle.dumps(cache))
    with torch.no_grad():
        model(tokens(1, 150), past_key_values=twin)
    twin.crop(-100)
    assert twin.get_seq_length() == 50


def test_without_the_library_a_written_model_is_an_error_and_not_dense(tmp_path):
    model = planned()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    program = (
        "import sys; sys.modules['moa_search'] = None\n"
        "import torch; torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "moa_search" in done.stderr
