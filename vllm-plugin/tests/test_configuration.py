"""Plans are found and refused while vLLM makes its configuration: before an engine starts, or any weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.config import try_get_generation_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from moa_search import Plan, SpanRule
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE
from moa_search.modeling.generation import refuse_plain_reload
from moa_vllm import registration
from moa_vllm.backend import SpanBackend

CPU_BACKEND = AttentionBackendEnum.CPU_ATTN.value


@pytest.fixture
def folder(demo_folder: str, tmp_path: Path) -> Path:
    """The demo model without its weights, which nothing here may miss."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(Path(demo_folder) / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def quarter(plans: Path) -> str:
    return str(plans / "quarter.json")


def configured(folder: Path, plan: Any = None, **options: Any) -> Any:
    extra = {} if plan is None else {"moa_plan": plan}
    args = EngineArgs(model=str(folder), dtype="float32", max_model_len=2048, additional_config=extra, **options)
    return args.create_engine_config()


def backend(config: Any) -> type:
    with set_current_vllm_config(config):
        return get_attn_backend(64, config.model_config.dtype, "auto")


def save_plan_in(folder: Path, plan: Plan) -> None:
    refuse_plain_reload(folder)
    config = json.loads((folder / "config.json").read_text())
    config[CONFIG_ATTRIBUTE] = json.loads(plan.dumps())
    (folder / "config.json").write_text(json.dumps(config))


def test_without_a_plan_vllm_is_as_it_was(folder: Path) -> None:
    config = configured(folder)
    assert config.attention_config.backend is None
    assert config.cache_config.block_size == 128
    found = backend(config)
    assert f"{found.__module__}.{found.__qualname__}" == CPU_BACKEND


def test_a_plan_takes_its_backend_and_small_blocks(folder: Path, quarter: str) -> None:
    config = configured(folder, quarter)
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert config.cache_config.block_size == 16
    assert backend(config) is SpanBackend
    assert configured(folder, quarter, block_size=32).cache_config.block_size == 32


def test_a_folder_saved_under_a_plan_is_served_under_it(folder: Path, quarter: str) -> None:
    before = configured(folder, quarter).model_config.try_get_generation_config()
    save_plan_in(folder, Plan.load(quarter))
    planned, dense = configured(folder), configured(folder, False)
    assert backend(planned) is SpanBackend
    assert backend(dense) is not SpanBackend
    for config in (planned, dense):
        assert config.model_config.try_get_generation_config() == before
        assert config.model_config.get_diff_sampling_param() == {}


def test_a_vllm_without_the_plug_in_refuses_such_a_folder(folder: Path, quarter: str) -> None:
    save_plan_in(folder, Plan.load(quarter))
    with pytest.raises(ValueError, match="this model was saved under a KV cache plan"):
        try_get_generation_config(str(folder), trust_remote_code=False)


def test_an_environment_variable(folder: Path, quarter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_PLAN", quarter)
    assert backend(configured(folder)) is SpanBackend


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, "--speculative-config"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend"),
    ],
)
def test_what_a_plan_cannot_be_served_with(folder: Path, quarter: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        configured(folder, quarter, **options)


def test_another_models_plan(folder: Path, quarter: str) -> None:
    model = Plan.load(quarter).model.model_copy(update={"num_hidden_layers": 2})
    save_plan_in(folder, Plan.uniform(SpanRule(64, 0), model))
    with pytest.raises(Exception, match="was made for another model: num_hidden_layers: 2 != 30"):
        configured(folder)


def test_no_such_file(folder: Path) -> None:
    with pytest.raises(Exception, match=r"/nowhere\.json"):
        configured(folder, "/nowhere.json")


def test_another_version_of_vllm(folder: Path, quarter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(Exception, match=r"vLLM 0\.33\.0: plans were tested with vLLM 0\.32"):
        configured(folder, quarter)
    configured(folder)  # without a plan it may be whatever it is


def test_a_vllm_without_the_hooks_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else plans would be ignored in silence."""
    monkeypatch.delattr("vllm.model_executor.models.config.MODELS_CONFIG_MAP")
    with pytest.raises(Exception, match="isn't known to moa-vllm"):
        registration.register_all()


def test_every_architecture_has_the_hook_once() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    before = dict(MODELS_CONFIG_MAP)
    registration.register_all()
    assert before == MODELS_CONFIG_MAP
    assert all(MODELS_CONFIG_MAP[name].switches_plans_on for name in ModelRegistry.get_supported_archs())
