"""Knobs: what they do to losses, and their way to Optuna's parameters and back."""

import math
from dataclasses import replace

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.errors import ConfigError
from moa_search.search.trade_off import lattice
from moa_search.search.tuning.knobs import RANGES, Knobs, KnobSpace, unit_losses, weigh

LENGTHS = (512, 1024, 2048)
SPACE = KnobSpace(LENGTHS, ("signed", "squared"))
LAYERS, PER_LAYER, RULES = 5, 3, 7


def random_losses(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.lognormal(size=(LAYERS * PER_LAYER, RULES)) * 10.0**j for j in range(len(LENGTHS))]


@st.composite
def knobs(draw, densities=None):
    def within(name):
        return draw(st.floats(*RANGES[name]))

    return Knobs(
        depth=tuple(within("depth") for _ in range(4)),
        length_log_weights=tuple(within("weight") for _ in LENGTHS[1:]),
        exponent=within("exponent"),
        layer_exponent=within("layer_exponent"),
        robust=within("robust"),
        criterion=draw(st.sampled_from(SPACE.criteria)),
        density=draw(st.floats(*densities)) if densities else None,
    )


class TestWeigh:
    def test_default_is_the_plain_sum_in_units_of_the_worst(self):
        losses = random_losses()
        plain = sum(loss / loss.max(axis=1).sum() for loss in losses)
        np.testing.assert_allclose(weigh(losses, PER_LAYER, SPACE.default), plain, rtol=1e-12)

    @given(knobs(), st.permutations(range(PER_LAYER)), st.integers(0, LAYERS - 1))
    def test_permuting_heads_of_a_layer_permutes_their_losses(self, setting, order, layer):
        losses = random_losses()
        heads = np.arange(LAYERS * PER_LAYER)
        heads[layer * PER_LAYER : (layer + 1) * PER_LAYER] = layer * PER_LAYER + np.array(order)
        permuted = weigh([loss[heads] for loss in losses], PER_LAYER, setting)
        np.testing.assert_allclose(permuted, weigh(losses, PER_LAYER, setting)[heads], rtol=1e-9)

    @given(knobs(), st.sampled_from([1e-12, 1e-3, 1e12]))
    def test_the_unit_of_losses_does_not_matter(self, setting, scale):
        expected = weigh(random_losses(), PER_LAYER, setting)
        np.testing.assert_allclose(weigh(random_losses(scale=scale), PER_LAYER, setting), expected, rtol=1e-9)

    @given(knobs())
    def test_nothing_lost_stays_nothing_and_no_loss_turns_negative(self, setting):
        losses = random_losses()
        for loss in losses:
            loss[:, -1] = 0
            loss[4] = 0
            loss[2 * PER_LAYER : 3 * PER_LAYER] = 0
        table = weigh(losses, PER_LAYER, setting)
        assert np.isfinite(table).all()
        np.testing.assert_array_equal(table == 0, losses[0] == 0)
        assert (table >= 0).all()

    def test_a_length_where_nothing_is_lost_adds_nothing(self):
        losses = random_losses()
        two = weigh([0 * losses[0], losses[1]], PER_LAYER, Knobs(length_log_weights=(2.0,)))
        np.testing.assert_allclose(two, weigh([losses[1]], PER_LAYER, Knobs()))
        assert not weigh([0 * losses[0]], PER_LAYER, Knobs(exponent=0.5, layer_exponent=0.5)).any()

    def test_each_knob_against_its_formula(self):
        losses = random_losses()[:1]
        unit = unit_losses(losses)[0]
        for head in range(len(unit)):
            layer = head // PER_LAYER
            scale = unit[head].max()
            influence = weigh(losses, PER_LAYER, Knobs(exponent=1.4))
            np.testing.assert_allclose(influence[head], unit[head] * scale**0.4)
            in_layer = sum(unit[other].max() for other in range(layer * PER_LAYER, (layer + 1) * PER_LAYER))
            np.testing.assert_allclose(
                weigh(losses, PER_LAYER, Knobs(layer_exponent=-0.3))[head], unit[head] * in_layer**0.3
            )
        log_depth = np.log(weigh(losses, PER_LAYER, Knobs(depth=(0.0, 1.0, -1.0, 0.4))) / unit)
        np.testing.assert_allclose(log_depth[::PER_LAYER, 0], [0, 0.75, 0, -0.65, 0.4], atol=1e-12)

    def test_one_layer_takes_the_first_depth(self):
        losses = [loss[:PER_LAYER] for loss in random_losses()[:1]]
        deep = weigh(losses, PER_LAYER, Knobs(depth=(1.0, 5.0, 5.0, 5.0)))
        np.testing.assert_allclose(deep, math.e * weigh(losses, PER_LAYER, Knobs()))


class TestParams:
    @given(knobs())
    def test_round_trip(self, setting):
        assert SPACE.from_params(SPACE.to_params(setting)) == setting

    @given(knobs(densities=(0.1, 0.5)))
    def test_a_trial_with_the_params_suggests_the_knobs(self, setting):
        space = replace(SPACE, densities=(0.1, 0.5))
        assert space.suggest(optuna.trial.FixedTrial(space.to_params(setting))) == setting

    def test_default_is_within_and_round_trips(self):
        for space in (SPACE, KnobSpace((512,)), replace(SPACE, densities=(0.1, 0.5))):
            assert space.from_params(space.to_params(space.default)) == space.default
            assert space.from_params({}) == space.default

    def test_what_lies_outside_is_cut_to_the_range(self):
        params = SPACE.to_params(replace(SPACE.default, depth=(-9.0, 9.0, 0.0, 0.0), robust=3.0))
        assert (params["depth_0"], params["depth_1"], params["robust"]) == (-1.5, 1.5, 2.0)

    def test_fixed_knobs_and_a_single_criterion_are_no_parameters(self):
        space = KnobSpace(LENGTHS, ("squared",), {"robust": 1.0, "weight_512": -2.0})
        assert not {"robust", "weight_512", "criterion"} & space.to_params(space.default).keys()
        suggested = space.suggest(optuna.trial.FixedTrial(space.to_params(space.default)))
        assert suggested == space.default
        assert (suggested.robust, suggested.length_log_weights[0], suggested.criterion) == (1.0, -2.0, "squared")

    def test_lattice_weights_become_ratios_to_the_last(self):
        assert SPACE.of_weights([0.2, 0.4, 0.4]).length_log_weights == pytest.approx((math.log(0.5), 0))
        assert SPACE.of_weights([1, 1, 1]) == SPACE.default
        for weights in lattice(3, 4):
            assert SPACE.from_params(SPACE.to_params(SPACE.of_weights(weights))) == SPACE.of_weights(weights)
        assert SPACE.of_weights([1, 0, 0]).length_log_weights == (3.0, 0.0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fixed", "message"),
        [
            ({"exponnent": 1.0}, "did you mean 'exponent'"),
            ({"robust": 2.5}, "from 0 to 2"),
            ({"robust": "much"}, "can't be 'much'"),
            ({"criterion": "recall"}, "isn't among signed, squared"),
            ({"density": 0.5}, "unknown"),
        ],
    )
    def test_fixed_knobs(self, fixed, message):
        with pytest.raises(ConfigError, match=message):
            KnobSpace(LENGTHS, ("signed", "squared"), fixed)

    @pytest.mark.parametrize("densities", [(0.5, 0.5), (0.5, 0.25), (0.0, 0.5), (0.5, 1.5)])
    def test_densities(self, densities):
        with pytest.raises(ConfigError, match="densities"):
            KnobSpace(LENGTHS, densities=densities)

    def test_knobs_of_another_space(self):
        with pytest.raises(ConfigError, match="lengths"):
            SPACE.to_params(Knobs())
        with pytest.raises(ConfigError, match="recall"):
            SPACE.to_params(replace(SPACE.default, criterion="recall"))
        with pytest.raises(ConfigError, match="density"):
            replace(SPACE, densities=(0.1, 0.5)).to_params(SPACE.default)
        with pytest.raises(ConfigError, match="weigh"):
            SPACE.of_weights([1, 0])
