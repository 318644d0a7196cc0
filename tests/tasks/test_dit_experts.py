"""DoRA of one of two experts: on its noise levels alone, in its own weights."""

import pytest
import torch
from hydra.utils import instantiate
from torch.testing import assert_close

from acetate import flow
from acetate.draws import ClipDraws
from acetate.models.adapters import trainable_state
from acetate.models.dit import FrozenDiT
from acetate.models.loading import load_transformer
from tests.experts import BOUNDARY, of_two, two_experts  # noqa: F401  (a fixture)
from tests.tasks.test_dit import config_for, fit

KEYS = [f"clip{n}" for n in range(4000)]


def draws():
    return ClipDraws(KEYS, 0, "train", 7, device=torch.device("cpu"))


@pytest.mark.parametrize("density", flow.DENSITIES)
def test_a_span_has_the_density_of_the_whole(density):
    """Divided by its share: as if all that is outside of it were drawn again."""
    levels, noise = flow.schedule(shift=12.0), flow.NoiseDraws(density=density, mean=0.4)
    whole, count = noise.ids(levels, draws()), levels.at_least(BOUNDARY)
    assert count == sum(t >= 875 for t in levels.timesteps.tolist()) == 632
    assert torch.equal(noise.ids(levels, draws(), (0, 1000)), whole)
    for first, end in ((0, count), (count, 1000)):
        found = noise.ids(levels, draws(), (first, end))
        assert first <= found.min() and found.max() < end
        kept = whole[(whole >= first) & (whole < end)]
        parts = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
        quantiles = (x.double().quantile(parts) for x in (found, kept))
        assert_close(*quantiles, rtol=0, atol=0.05 * (end - first))
        assert torch.equal(noise.ids(levels, draws(), (first, end)), found)
    alone = ClipDraws(KEYS[5:6], 0, "train", 7, device=torch.device("cpu"))
    assert noise.ids(levels, alone, (count, 1000)) == noise.ids(levels, draws(), (count, 1000))[5]


@pytest.fixture
def expert(two_experts, cached, tmp_path):
    def config(run, which, *overrides):
        more = [f"task.base.expert={which}", "task.noise.shift=12", *overrides]
        return config_for(tmp_path / run, cached, *of_two(two_experts), *more)

    return config


@pytest.mark.slow
@pytest.mark.parametrize("which", ["high", "low"])
def test_trains_its_own_weights_on_its_own_levels(two_experts, expert, which, tmp_path):
    seen = []

    def note(levels, ids):
        seen.extend(levels.timesteps[ids].tolist())
        return torch.ones(len(ids))

    config = expert("a", which, "trainer.max_steps=6")
    task, data = instantiate(config.task), instantiate(config.data)
    task.noise.weights = note
    instantiate(config.trainer, logger=False, callbacks=[]).fit(task, data)
    assert len(seen) == 12
    assert all((t >= 875) == (which == "high") for t in seen)
    assert all((int(name[-4:]) >= 875) == (which == "high") for name in task.val_ids)
    part = {"high": "transformer", "low": "transformer_2"}[which]
    own = load_transformer(str(two_experts), part=part).proj_out.weight
    assert torch.equal(task.transformer.proj_out.weight, own)
    facts = task.facts()
    assert (facts["expert"], facts["boundary"]) == (which, BOUNDARY)


@pytest.mark.slow
def test_resume_is_exact_and_of_the_same_expert(expert, tmp_path):
    whole = fit(expert("a", "low", "trainer.max_steps=4"))
    fit(expert("b", "low", "trainer.max_steps=2", "task.decay_steps=4"))
    checkpoint = tmp_path / "b/checkpoints/last.ckpt"
    rest = fit(expert("b", "low", "trainer.max_steps=4"), resume=checkpoint)
    assert rest[2].losses == whole[2].losses[2:]
    for a, b in zip(*(trainable_state(run[1]).values() for run in (whole, rest)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="trained with expert 'low', now 'high'"):
        fit(expert("c", "high", "trainer.max_steps=4"), resume=checkpoint)


def test_levels_of_other_sizes_have_other_spans(expert):
    task = instantiate(expert("a", "high", "task.noise.shift_tokens=400").task)
    spans = [task.span_for(torch.zeros(1, 16, 1, side, side)) for side in (20, 10)]
    u = [0.875 / (shift - 0.875 * (shift - 1)) for shift in (12, 6)]
    assert [span[0] for span in spans] == [0, 0]
    assert [span[1] for span in spans] == pytest.approx([1000 * (1 - x) for x in u], abs=1)


def test_expert_and_base_fit_together():
    with pytest.raises(ValueError, match=r"nowhere is one DiT .*task\.base\.expert=null"):
        FrozenDiT("nowhere", "float32", expert="high")
    with pytest.raises(ValueError, match=r"has two experts, .*-m task\.base\.expert=high,low"):
        FrozenDiT("here", "float32", "there", 0.875)
    with pytest.raises(ValueError, match=r"expert 'middle'; known: high, low"):
        FrozenDiT("here", "float32", "there", 0.875, "middle")
