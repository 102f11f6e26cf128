"""Studies: opened again only for what they were made for."""

import optuna
import pytest

from moa_search.errors import ConfigError
from moa_search.search.tuning import studies
from moa_search.search.tuning.studies import keep_settings, open_study


def drawn(study):
    return study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"]


class TestOpenStudy:
    def test_it_is_made_once_and_found_again(self, tmp_path):
        open_study(None, tmp_path, "tune", ["minimize"]).enqueue_trial({"x": 0.5})
        assert drawn(open_study(None, tmp_path, "tune", ["minimize"])) == 0.5
        assert (tmp_path / "study.journal").exists()

    def test_other_objectives_are_refused(self, tmp_path):
        open_study(None, tmp_path, "tune", ["minimize"])
        with pytest.raises(ConfigError, match="1 objectives to minimize, not 2"):
            open_study(None, tmp_path, "tune", ["minimize", "minimize"])

    def test_several_workers_on_sqlite_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="can't serve 2 workers"):
            open_study(f"sqlite:///{tmp_path}/a.db", tmp_path, "tune", ["minimize"], workers=2)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("sampler", ["random", "tpe"])
    def test_same_seed_same_draws_but_not_for_another_worker_or_a_resumed_run(self, tmp_path, sampler):
        def first(folder, **options):
            return drawn(open_study(None, tmp_path / folder, "tune", ["minimize"], sampler, 3, **options))

        draws = [first("a"), first("b", worker=1), first("a"), first("c", worker=0)]
        assert draws[0] == draws[3]
        assert len(set(draws)) == 3

    def test_unknown_sampler_and_missing_package(self, tmp_path, monkeypatch):
        with pytest.raises(ConfigError, match="choose from tpe, gp, random"):
            open_study(None, tmp_path, "tune", ["minimize"], "cma")
        monkeypatch.setattr(studies, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="gp needs scipy"):
            open_study(None, tmp_path, "tune", ["minimize"], "gp")


class TestSettings:
    @pytest.fixture
    def study(self, tmp_path):
        return open_study(None, tmp_path, "tune", ["minimize"])

    def test_equal_ones_are_kept(self, study):
        keep_settings(study, {"profile": "a", "budgets": (1, 2)})
        keep_settings(study, {"profile": "a", "budgets": [1, 2]})

    @pytest.mark.parametrize(
        "other", [{"profile": "b", "data": 1}, {"data": 1}, {"profile": "a", "data": 1, "model": 2}]
    )
    def test_the_field_that_differs_is_named(self, study, other):
        keep_settings(study, {"profile": "a", "data": 1})
        with pytest.raises(ConfigError, match="profile" if other.get("profile") != "a" else "model"):
            keep_settings(study, other)

    def test_a_study_of_someone_else(self, study):
        study.enqueue_trial({"x": 1.0})
        with pytest.raises(ConfigError, match="wasn't made by moa-search tune"):
            keep_settings(study, {"profile": "a"})
