"What links cost, in virtual time"
import pytest

from lah_nb.simulation.links import compare_links

pytestmark = pytest.mark.timeout(300)
NAMES = 'dmoe', 'model_parallel', 'pipelined', 'streamed'


def test_the_same_seed_gives_the_same_figures_and_another_one_others():
    told, again, other = (compare_links(delay_ms=200., peers=2, in_flight=1, seed=seed) for seed in (0, 0, 1))
    untimed = lambda told: {name: value for name, value in told.items() if name not in ('took', 'seed')}
    assert untimed(told) == untimed(again) != untimed(other)


def test_a_mixture_loses_less_to_delay_than_a_model_that_is_spread():
    told = {delay: compare_links('transformer', delay_ms=delay, peers=3, in_flight=5) for delay in (0., 200.)}
    kept = {name: told[200.][name] / told[0.][name] for name in NAMES}
    assert kept['dmoe'] > 1.2 * kept['model_parallel'] and kept['dmoe'] > 1.2 * kept['pipelined']
    assert all(one['failed_calls'] == 0 for one in told.values())


def test_a_wider_line_and_a_shorter_codec_are_never_slower():
    narrow = dict(peers=2, in_flight=1, down=1000.)
    slow, fast, short = (compare_links(**narrow, up=up, codec=codec) for up, codec in ((200., 'none'), (400., 'none'), (200., 'blockwise8')))
    for name in NAMES: assert slow[name] <= fast[name] and slow[name] <= short[name]
