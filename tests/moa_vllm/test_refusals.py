"""What the vLLM plug-in finds and refuses; vLLM itself isn't needed for that."""

import json
from types import SimpleNamespace

import pytest

from moa_search import Plan, SpanRule
from moa_search.errors import (
    BackendUnavailableError,
    ConfigError,
    MoAError,
    ModelMismatchError,
    ModelUnsupportedError,
    PlanFormatError,
    UnsupportedInputError,
)
from moa_search.formats import ModelSignature
from moa_vllm.lookup import find_plan, names_plan
from moa_vllm.refusals import require_platform, require_servable
from moa_vllm.served import served_plan
from moa_vllm.versions import require_tested

PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
KINDS = ("use_mla", "is_hybrid", "is_attention_free", "is_encoder_decoder", "is_mm_prefix_lm")


@pytest.fixture
def hf_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    )


@pytest.fixture
def plan(hf_config):
    return Plan.uniform(SpanRule(64, 0), ModelSignature.of(hf_config))


@pytest.fixture
def config(hf_config, tmp_path, monkeypatch):
    """The parts of a ``VllmConfig`` that are looked at; the plug-in's own tests use real ones."""
    for variable in ("MOA_PLAN", "MOA_GROUPS"):
        monkeypatch.delenv(variable, raising=False)
    return SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(
            model=str(tmp_path),
            hf_config=hf_config,
            hf_text_config=hf_config,
            max_model_len=512,
            runner_type="generate",
            get_total_num_kv_heads=lambda: hf_config.num_key_value_heads,
            **dict.fromkeys(KINDS, False),
        ),
        parallel_config=SimpleNamespace(**dict.fromkeys(PARALLEL, 1), use_ubatching=False),
        cache_config=SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False, kv_offloading_size=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=None),
        attention_config=SimpleNamespace(backend=None),
        speculative_config=None,
        kv_transfer_config=None,
    )


def test_no_plan_is_no_plan(config):
    assert not names_plan(config)
    assert find_plan(config) is None


def test_options_go_before_the_environment_before_the_saved_folder(config, hf_config, plan, tmp_path, monkeypatch):
    saved, elsewhere, other = (Plan.uniform(SpanRule(rule, 0), plan.model) for rule in (100, 200, 300))
    hf_config.moa_plan = json.loads(saved.dumps())
    found = find_plan(config)
    assert (found.plan.rules, found.source, found.groups) == (saved.rules, str(tmp_path), None)
    elsewhere.save(tmp_path / "elsewhere.json")
    monkeypatch.setenv("MOA_PLAN", str(tmp_path / "elsewhere.json"))
    assert find_plan(config).plan.rules == elsewhere.rules
    other.save(tmp_path / "other.json")
    config.additional_config = {"moa_plan": str(tmp_path / "other.json"), "moa_groups": 3}
    assert (find_plan(config).plan.rules, find_plan(config).groups) == (other.rules, 3)
    config.additional_config = {"moa_plan": json.loads(plan.dumps())}
    assert find_plan(config).plan.rules == plan.rules
    config.additional_config = {"moa_plan": False}
    assert find_plan(config) is None


def test_a_folder_is_read_as_transformers_reads_it(config, hf_config, plan, tmp_path):
    plan.save(tmp_path / "moa_plan.json")
    assert find_plan(config).plan.rules == plan.rules
    hf_config.moa_plan = json.loads(Plan.uniform(SpanRule(100, 0), plan.model).dumps())
    with pytest.raises(ConfigError, match="hold different plans"):
        find_plan(config)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"moa_plan": "/nowhere.json"}, ConfigError, "/nowhere.json"),
        ({"moa_plan": {"schema": "moa-plan/1"}}, PlanFormatError, "moa_plan"),
        ({"moa_plan": True}, ConfigError, "neither a plan file"),
        ({"moa_plan": "PLAN", "moa_groups": 0}, ConfigError, "moa_groups: 0"),
        ({"moa_plan": "PLAN", "moa_groups": "many"}, ConfigError, "moa_groups: 'many'"),
    ],
)
def test_what_names_no_plan_is_an_error(config, plan, tmp_path, options, error, says):
    plan.save(tmp_path / "plan.json")
    config.additional_config = {k: str(tmp_path / "plan.json") if v == "PLAN" else v for k, v in options.items()}
    with pytest.raises(error, match=says) as refused:
        find_plan(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        *(("parallel_config", name, 4, "--" + name.replace("_", "-")) for name in PARALLEL),
        ("parallel_config", "use_ubatching", True, "--enable-dbo"),
        ("cache_config", "cache_dtype", "fp8", "--kv-cache-dtype fp8"),
        ("cache_config", "cache_dtype", "int4_per_token_head", "--kv-cache-dtype int4_per_token_head"),
        ("cache_config", "kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("cache_config", "kv_offloading_size", 4.0, "--kv-offloading-size"),
        ("scheduler_config", "disable_hybrid_kv_cache_manager", True, "--disable-hybrid-kv-cache-manager"),
        ("attention_config", "backend", SimpleNamespace(name="FLASH_ATTN"), "--attention-backend"),
        (None, "speculative_config", object(), "--speculative-config"),
        (None, "kv_transfer_config", object(), "--kv-transfer-config"),
        *(("model_config", kind, True, "vLLM can't serve models with") for kind in KINDS),
        ("model_config", "runner_type", "pooling", "answers other than text"),
    ],
)
def test_what_a_plan_cannot_be_served_with(config, plan, part, name, value, says):
    require_servable(plan, "plan.json", config)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises((UnsupportedInputError, ModelUnsupportedError), match=says) as refused:
        require_servable(plan, "plan.json", config)
    assert str(refused.value).startswith("plan.json: ")
    assert "\n" not in str(refused.value)


def test_ranks_may_share_the_heads(config, plan):
    config.parallel_config.tensor_parallel_size = 2
    require_servable(plan, "plan.json", config)
    config.model_config.get_total_num_kv_heads = lambda: 3
    with pytest.raises(UnsupportedInputError, match="can't be served with --tensor-parallel-size 2"):
        require_servable(plan, "plan.json", config)


def test_the_own_backend_may_be_named(config, plan):
    config.attention_config.backend = SimpleNamespace(name="CUSTOM")
    require_servable(plan, "plan.json", config)


def test_plans_that_are_not_served(config, plan):
    rules, model = plan.rules, plan.model
    with pytest.raises(UnsupportedInputError, match="anchored at the prompt"):
        require_servable(plan.model_copy(update={"anchor": "prompt"}), "plan.json", config)
    eight_bits = Plan.from_rules(rules, model, tiers=[[(8, 8), (16, 16)], [(16, 16)] * 2])
    with pytest.raises(UnsupportedInputError, match="fewer than 16 bits"):
        require_servable(eight_bits, "plan.json", config)
    windowed = model.model_copy(update={"config": {**model.config, "sliding_window": 64}})
    config.model_config.hf_config.sliding_window = 64
    native = Plan.from_rules(rules, windowed, native_layers=[1])
    with pytest.raises(UnsupportedInputError, match="own sliding window"):
        require_servable(native, "plan.json", config)
    other = Plan.uniform(SpanRule(64, 0), model.model_copy(update={"head_dim": 8}))
    with pytest.raises(ModelMismatchError, match=r"plan\.json was made for another model: head_dim"):
        require_servable(other, "plan.json", config)


def platform(kind):
    return SimpleNamespace(is_cpu=lambda: kind == "cpu", is_cuda=lambda: kind == "cuda", device_name=kind)


def test_gpus_are_refused_unless_they_are_to_be_tried(config, monkeypatch):
    monkeypatch.delenv("MOA_GPU", raising=False)
    require_platform(platform("cpu"), config)
    with pytest.raises(BackendUnavailableError, match="vLLM on cuda was never tested under a plan; MOA_GPU=1 tries it"):
        require_platform(platform("cuda"), config)
    monkeypatch.setenv("MOA_GPU", "1")
    require_platform(platform("cuda"), config)
    with pytest.raises(BackendUnavailableError, match="vLLM on tpu can't serve plans"):
        require_platform(platform("tpu"), config)
    monkeypatch.setenv("MOA_GPU", "0")
    config.additional_config = {"moa_gpu": True}
    require_platform(platform("cuda"), config)
    config.additional_config = {"moa_gpu": "true"}
    with pytest.raises(BackendUnavailableError):
        require_platform(platform("cuda"), config)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.32.4.post1"])
def test_tested_versions(version):
    require_tested(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.320.0", "dev"])
def test_other_versions_are_refused(version):
    with pytest.raises(BackendUnavailableError, match=f"vLLM {version}: plans were tested with vLLM 0.32"):
        require_tested(version)


def test_heads_are_grouped_for_the_longest_context(config, plan, tmp_path):
    far, near = SpanRule(0, 128), SpanRule(64, 0)
    Plan.from_rules([[far, near], [near, far]], plan.model).save(tmp_path / "moa_plan.json")
    served = served_plan(config)
    assert served.groups.longest == 512
    assert served.groups.group_of == ((0, 1), (1, 0))
    (tmp_path / "moa_plan.json").unlink()
    with pytest.raises(MoAError, match="no plan is named"):
        served_plan(config)
