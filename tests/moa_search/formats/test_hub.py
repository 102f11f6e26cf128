"""Plans that travel through the hub: a stand-in of its HTTP API on loopback answers `huggingface_hub` itself."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import moa_search
from moa_search.api import inspect_plan, inspect_plans, push_plans
from moa_search.cli import inspect as inspect_command
from moa_search.errors import ConfigError, HubError, MoAError, ModelMismatchError, PlanFormatError
from moa_search.formats import Plan
from moa_search.formats.card import BEGIN
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import SpanRule

from .hub_by_hand import TOKEN, Hub, Repository
from .test_golden import MODEL
from .test_plan import validation
from .test_plan_tiers import MIXED, RULES, transforms

# huggingface_hub 2.4 sends LFS files by a keyword that its HTTP library wants to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/plans"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of its own, online, with nothing in the cache yet, and a token that may write."""
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template[template.index("/{repo_id}") :])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def coded(tiers=MIXED, seed=0):
    return Plan.from_rules(RULES, MODEL, tiers=tiers, transforms=transforms(seed))


def of_span(tokens, **fields):
    return Plan.uniform(SpanRule(tokens, 0), MODEL, **fields)


def card_of(hub, repo=REPO):
    return hub.repositories[repo].commits[-1]["README.md"].decode()


def test_a_plan_is_pushed_and_comes_back(hub, tiny_plan):
    address = tiny_plan.push_to_hub(REPO, "quarter", base_model="org/model", license="apache-2.0")
    assert address.startswith(f"{hub.url}/{REPO}/commit/")
    assert Plan.from_pretrained(REPO, "quarter") == tiny_plan
    assert Plan.from_pretrained(REPO, "quarter.json") == tiny_plan
    assert Plan.from_pretrained(REPO) == tiny_plan  # there is no other
    assert Plan.load(f"hf://{REPO}/quarter") == Plan.of(f"hf://{REPO}/quarter.json") == tiny_plan


def test_transforms_of_keys_travel_with_their_plan(hub, tmp_path):
    one, other = coded(), coded([[(2, 2)] * 2] * 2)
    one.save(tmp_path / "plans" / "one.json")
    other.save(tmp_path / "plans" / "other.json")
    push_plans(tmp_path / "plans", repo=REPO)
    there = hub.repositories[REPO].commits[-1]
    assert sorted(there) == [
        ".gitattributes",
        "README.md",
        "one.json",
        "other.json",
        KeyTransforms.file_name(one.transforms),
    ]
    back = Plan.from_pretrained(REPO, "other")
    assert back == other
    assert back.key_transforms == transforms()
    (content,) = hub.repositories[REPO].stored.values()
    assert content == one.key_transforms.to_bytes(), "sent by LFS, once for both plans"


def test_transforms_of_a_real_size_go_by_lfs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3] / "profiles" / "smollm2-135m-instruct")
    plan = Plan.load("eighth-bytes.json")
    plan.push_to_hub(REPO, "eighth")
    Plan.load("quarter-bytes.json").push_to_hub(REPO, "quarter")  # its transforms are there already
    ((oid, content),) = hub.repositories[REPO].stored.items()
    assert len(content) > 10**6
    assert [asked for asked in hub.requests if asked.startswith("PUT")] == [f"PUT store/{REPO}/{oid}"]
    back = Plan.from_pretrained(REPO, "eighth")
    assert back == plan
    assert back.key_transforms.to_bytes() == plan.key_transforms.to_bytes()


def test_xet_that_fails_is_one_line(hub, monkeypatch):
    """hf_xet has errors of its own; the hub here gives it no token for its store."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    hub.repositories[REPO] = Repository()
    with pytest.raises(HubError, match=f"^{REPO} can't be written: the hub can't be reached") as caught:
        coded().push_to_hub(REPO, "one")
    assert "\n" not in str(caught.value)


def test_a_store_that_fails_is_one_line(hub):
    hub.store_fails = 507
    with pytest.raises(HubError, match=f"^{REPO} can't be written: .*507") as caught:
        coded().push_to_hub(REPO, "one")
    assert "\n" not in str(caught.value)
    assert list(hub.repositories[REPO].commits[-1]) == [".gitattributes"], "no plan without its transforms"


def test_a_plan_and_its_transforms_are_of_one_commit(hub):
    coded(seed=0).push_to_hub(REPO, "plan")
    Plan.from_pretrained(REPO, "plan")
    coded(seed=1).push_to_hub(REPO, "plan")
    assert Plan.from_pretrained(REPO, "plan").key_transforms == transforms(1)
    first = hub.repositories[REPO].commits[1]
    from .hub_by_hand import commit_of

    assert Plan.from_pretrained(REPO, "plan", revision=commit_of(first)).key_transforms == transforms(0)


def test_one_repository_holds_a_folder_of_plans_and_later_ones(hub, tmp_path):
    for name, tokens in {"half": 512, "quarter": 256}.items():
        of_span(tokens).save(tmp_path / "plans" / f"{name}.json")
    (tmp_path / "plans" / "notes.json").write_text('{"mine": 1}')
    push_plans(str(tmp_path / "plans"), repo=REPO, base_model="org/model")
    of_span(128).push_to_hub(REPO, "eighth")
    found = inspect_plans(REPO)
    assert {name: plan.rules[0][0].alpha for name, plan in found.items()} == {
        "eighth": 128,
        "half": 512,
        "quarter": 256,
    }
    assert hub.repositories[REPO].messages == ["Plans: half, quarter", "Plans: eighth"]
    card = card_of(hub)
    assert all(f"`{name}`" in card for name in found)
    assert "base_model: org/model" in card  # the later push didn't say it again
    with pytest.raises(ConfigError, match=r"holds several plans; give one of eighth, half, quarter"):
        Plan.from_pretrained(REPO)


def test_commands_list_and_read_repositories(hub, capsys, monkeypatch, tmp_path):
    of_span(256).push_to_hub(REPO, "quarter")
    assert inspect_command.command_for([f"hf://{REPO}"]) == "plans"
    assert inspect_command.command_for([REPO]) == "plan", "which may be a folder that isn't there"
    assert inspect_command.command_for([f"hf://{REPO}/quarter"]) == "plan"
    monkeypatch.setattr("sys.argv", ["moa-inspect", "plans", REPO, "--lengths", "1024"])
    with pytest.raises(SystemExit) as ended:
        inspect_command.main()
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "quarter" in shown
    assert "25.0%" in shown
    assert f'Plan.from_pretrained("{REPO}", "quarter")' in shown
    saved = tmp_path / "mine.json"
    assert inspect_plan(f"hf://{REPO}/quarter", save=str(saved)) == Plan.load(saved) == of_span(256)


def test_what_was_read_once_is_there_offline(hub, monkeypatch, tmp_path):
    coded().push_to_hub(REPO, "plan")
    Plan.from_pretrained(REPO, "plan")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert Plan.from_pretrained(REPO, "plan") == coded()
    assert len(hub.requests) == before


class TestFolders:
    """The same by folder, without any hub."""

    @pytest.fixture
    def folder(self, tmp_path):
        coded().save(tmp_path / "plans" / "coded.json")
        of_span(256).save(tmp_path / "plans" / "quarter.json")
        return tmp_path / "plans"

    def test_plans_are_read_and_listed(self, folder):
        assert Plan.from_pretrained(folder, "coded") == coded()
        assert list(inspect_plans(str(folder))) == ["coded", "quarter"]
        assert inspect_command.command_for([str(folder)]) == "plans"

    def test_a_name_that_isnt_there(self, folder):
        with pytest.raises(ConfigError, match=r"holds no plan 'quater' \(did you mean 'quarter'\?\); there are coded"):
            Plan.from_pretrained(folder, "quater")


class TestCard:
    def test_it_says_model_losses_and_licence_and_how_to_use_them(self, hub):
        plan = of_span(256, validated=(validation(), validation(length=1024, loss_error=None, dense_loss=None)))
        plan.push_to_hub(REPO, "quarter", base_model="org/model", license="apache-2.0")
        card = ModelCard(card_of(hub))
        assert card.data.base_model == "org/model"
        assert (card.data.license, card.data.library_name) == ("apache-2.0", "moa-search")
        assert "kv-cache-plan" in card.data.tags
        assert "| `quarter` | 4096 | 16 | 0.500 [0.378, 0.623] | 0.250 |" in card.text
        assert "| `quarter` | 1024 | 16 | 0.500 |  |" in card.text
        assert "Licence: apache-2.0." in card.text

    def test_its_five_lines_run(self, hub, tiny_model_dir):
        from moa_search import ModelSignature, load_model

        signature = ModelSignature.of(load_model(str(tiny_model_dir))[0].config)
        Plan.uniform(SpanRule(64, 0), signature).push_to_hub(REPO, "short", base_model=str(tiny_model_dir))
        lines = card_of(hub).split("```python\n")[1].split("```")[0]
        assert len(lines.strip().splitlines()) <= 7
        exec(lines.replace("=50", "=3"), {})

    def test_what_people_wrote_stays(self, hub):
        of_span(256).push_to_hub(REPO, "quarter")
        files = hub.repositories[REPO].commits[-1]
        mine = files["README.md"].decode().replace("---\n\n<!--", "extra: kept\n---\n\nMy words.\n\n<!--")
        hub.repositories[REPO].commits.append({**files, "README.md": f"{mine}\nMore words.\n".encode()})
        of_span(128).push_to_hub(REPO, "eighth")
        card = card_of(hub)
        assert card.count(BEGIN) == 1
        assert "extra: kept" in card
        assert card.index("My words.") < card.index(BEGIN) < card.index("`eighth`") < card.index("More words.")

    def test_texts_out_of_plans_stay_in_their_cells(self, hub, tiny_plan):
        origin = tiny_plan.provenance.model_copy(update={"searcher": "a | b\n# c <script>"})
        tiny_plan.model_copy(update={"provenance": origin}).push_to_hub(REPO, "quarter")
        assert r"searcher a \| b\n# c &lt;script>" in card_of(hub)


def broken(hub, file, content):
    of_span(256).push_to_hub(REPO, "quarter")
    files = hub.repositories[REPO].commits[-1]
    hub.repositories[REPO].commits.append({**files, file: content})


def without_transforms(hub):
    coded().push_to_hub(REPO, "plan")
    files = hub.repositories[REPO].commits[-1]
    kept = {name: content for name, content in files.items() if not name.startswith("transforms")}
    hub.repositories[REPO].commits.append(kept)


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unreachable(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


WRONG = {
    "no such plan": (
        lambda hub, _: (of_span(9).push_to_hub(REPO, "quarter"), Plan.from_pretrained(REPO, "quater")),
        ConfigError,
        r"org/plans: holds no plan 'quater' \(did you mean 'quarter'\?\)",
    ),
    "no such repository": (lambda *_: Plan.from_pretrained("org/none", "plan"), HubError, "nor a repository that you"),
    "no such revision": (
        lambda *_: (of_span(9).push_to_hub(REPO, "a"), Plan.from_pretrained(REPO, "a", revision="v9")),
        HubError,
        "no such revision",
    ),
    "no name of a repository": (lambda *_: Plan.from_pretrained("a/b/c", "plan"), HubError, "nor the name of a repos"),
    "a scheme without a plan's name": (lambda *_: Plan.load("hf://org/plans/a/b"), ConfigError, "expected hf://ORG"),
    "a repository without plans": (
        lambda hub, _: (broken(hub, "quarter.json", b"{}"), Plan.from_pretrained(REPO)),
        ConfigError,
        "holds no plans",
    ),
    "a damaged plan": (
        lambda hub, _: (broken(hub, "half.json", of_span(9).dumps().encode()[:400]), inspect_plans(REPO)),
        PlanFormatError,
        "org/plans: half.json: not a JSON file, or a truncated one",
    ),
    "transforms that were left behind": (
        lambda hub, _: (without_transforms(hub), Plan.from_pretrained(REPO, "plan")),
        HubError,
        "plan.json needs transforms-",
    ),
    "offline": (lambda _, patch: (offline(patch), Plan.from_pretrained(REPO, "a")), HubError, "unset HF_HUB_OFFLINE"),
    "offline, listing": (lambda _, patch: (offline(patch), inspect_plans(REPO)), HubError, "unset HF_HUB_OFFLINE"),
    "offline, pushing": (
        lambda _, patch: (offline(patch), of_span(9).push_to_hub(REPO, "a")),
        HubError,
        "can't be written: the hub can't be reached",
    ),
    "a hub that is down": (lambda _, patch: (unreachable(patch), inspect_plans(REPO)), HubError, "can't be reached"),
    "a hub that is down, pushing": (
        lambda _, patch: (unreachable(patch), of_span(9).push_to_hub(REPO, "a")),
        HubError,
        "can't be reached",
    ),
    "a hub out of order": (
        lambda hub, _: (setattr(hub, "failing", 418), of_span(9).push_to_hub(REPO, "a")),
        HubError,
        "the hub answers 418: out of order",
    ),
    "a token that may not write": (
        lambda *_: of_span(9).push_to_hub(REPO, "a", token="hf_reader"),
        HubError,
        "log in with a token that may write",
    ),
    "a plan's name that is a path": (lambda *_: of_span(9).push_to_hub(REPO, "../a"), ConfigError, "plan name '../a'"),
    "a plan's name that is a model's file": (
        lambda *_: of_span(9).push_to_hub(REPO, "config.json"),
        ConfigError,
        "plan name 'config.json'",
    ),
    "pushing to no repository": (lambda *_: of_span(9).push_to_hub("plans", "a"), ConfigError, "such as org/plans"),
    "pushing a plan that lacks its transforms": (
        lambda *_: Plan.loads(coded().dumps()).push_to_hub(REPO, "a"),
        PlanFormatError,
        "weren't read with it",
    ),
    "pushing an empty folder": (lambda *_: push_plans("docs/images", repo=REPO), ConfigError, "holds no plans"),
    "pushing a file that isn't there": (lambda *_: push_plans("no.json", repo=REPO), ConfigError, "No such file"),
    "pushing nowhere": (lambda *_: push_plans("profiles/smollm2-135m-instruct"), ConfigError, "repo"),
    "a card whose head is no YAML": (
        lambda hub, _: (broken(hub, "README.md", b"---\n[1\n---\n"), of_span(9).push_to_hub(REPO, "a")),
        MoAError,
        "org/plans: the head of its README.md is no YAML",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(case, hub, monkeypatch):
    use, error, told = WRONG[case]
    with pytest.raises(error, match=told) as caught:
        use(hub, monkeypatch)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, moa_search.MoAError)


def test_plans_of_another_model_dont_go_into_one_repository(hub, tiny_plan):
    of_span(9).push_to_hub(REPO, "a")
    with pytest.raises(ModelMismatchError, match=r"plan b \(beside a in org/plans\) was made for another model"):
        tiny_plan.push_to_hub(REPO, "b")
    assert "b.json" not in hub.repositories[REPO].commits[-1]


def test_private_repositories_are_made_private_and_ask_who_reads(hub, monkeypatch):
    of_span(9).push_to_hub(REPO, "a", private=True)
    assert hub.repositories[REPO].private
    with pytest.raises(HubError, match="log in: hf auth login"):
        Plan.from_pretrained(REPO, "a", token=False, force_download=True)
