import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from acetate.metrics.matting import MattingErrors, connectivity_error, gradient_error
from tests.processes import launch


def disc(frames=4, shift=0.0, radius=9.0):
    """A soft disc that moves a pixel a frame, (1, 1, T, 32, 40)."""
    y, x = torch.arange(32.0)[:, None], torch.arange(40.0)[None]
    t = torch.arange(float(frames))[:, None, None]
    distance = ((x - 12 - t - shift) ** 2 + (y - 16) ** 2).sqrt()
    return ((radius - distance) / 3 + 0.5).clamp(0, 1)[None, None]


def figures(prediction, target, **settings):
    metric = MattingErrors(**settings)
    metric.update(prediction, target)
    return {name: float(value) for name, value in metric.compute().items()}


def test_known_errors():
    target = torch.zeros(1, 1, 2, 10, 20)
    target[..., :10], target[..., 10:12] = 1, 0.5
    prediction = target.clone()
    prediction[..., 10:12] = 0.7
    prediction[..., 15:] = 0.1
    found = figures(prediction, target)
    # of 200 pixels 20 are 0.2 and 50 are 0.1 away
    assert found["mad"] == pytest.approx(1e3 * (20 * 0.2 + 50 * 0.1) / 200, rel=1e-5)
    assert found["mse"] == pytest.approx(1e3 * (20 * 0.04 + 50 * 0.01) / 200, rel=1e-5)
    assert found["sad"] == pytest.approx(9 / 1e3, rel=1e-5)
    assert found["mad_mixed"] == pytest.approx(200, rel=1e-5)
    assert found["mse_mixed"] == pytest.approx(40, rel=1e-5)
    assert found["residue"] == pytest.approx(50 * 0.1 / 80, rel=1e-5)
    assert found["soft_iou"] == pytest.approx(110 / (110 + 4 + 5), rel=1e-5)
    assert found["dtssd"] == 0
    assert found["sad_mixed"] == pytest.approx(20 * 0.2 / 1e3, rel=1e-5)
    assert 0 < found["grad_mixed"] < found["grad"] and found["conn_mixed"] <= found["conn"]


def test_known_dtssd():
    target, prediction = torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, 3, 4, 4)
    prediction[:, :, 1] = 0.5  # it comes and goes: 0, 0.5, 0.5
    assert figures(prediction, target)["dtssd"] == pytest.approx(1e2 * (0.5 + 0.5) / 3)


def test_a_region_that_hangs_on_nothing_counts():
    target = torch.zeros(1, 12, 12)
    target[:, 2:6, 2:6] = 1
    loose = target.clone()
    loose[:, 9, 9] = 1  # 1 - 0 away from the level at which it hangs together with the square
    assert float(connectivity_error(loose, target)) == pytest.approx(1e-3)
    assert float(connectivity_error(target, target)) == 0


@pytest.mark.parametrize("name", ["mad", "mse", "sad", "grad", "conn", "dtssd", "residue"])
def test_errors_grow_with_the_defect(name):
    target = disc()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(target.shape, generator=generator)
    found = [figures(target + strength * noise, target)[name] for strength in (0, 0.2, 0.4)]
    assert found[0] == pytest.approx(0, abs=1e-9) and found[0] < found[1] < found[2]


def test_each_defect_has_its_figure():
    target = torch.full((1, 1, 4, 8, 8), 0.5)
    sign = torch.tensor([1.0, -1, 1, -1])[:, None, None]
    steady, flickering = figures(target + 0.1, target), figures(target + 0.1 * sign, target)
    assert steady["mad"] == pytest.approx(flickering["mad"], rel=1e-5)
    assert steady["dtssd"] == pytest.approx(0, abs=1e-6)
    assert flickering["dtssd"] == pytest.approx(1e2 * 0.2 * 3 / 4, rel=1e-5)
    twice = figures(disc() * disc(), disc())  # multiplied twice: soft pixels alone are wrong
    soft = float(((disc() > 0) & (disc() < 1)).float().mean())
    assert twice["residue"] == 0 and twice["mad_mixed"] > 100
    assert twice["mad"] == pytest.approx(twice["mad_mixed"] * soft, rel=1e-4)


def test_the_stretched_gradient_is_blind_to_contrast():
    target = disc()[0, 0]
    assert float(gradient_error(target / 2, target, normalised=True).max()) < 1e-6
    assert float(gradient_error(target / 2, target).min()) > 1e-3


def test_batches_are_the_mean_of_their_clips():
    first, second = disc(shift=1), disc(shift=2)
    both = MattingErrors()
    both.update(torch.cat([first, second]), torch.cat([disc(), disc()]))
    alone = MattingErrors()
    alone.update(first, disc())
    alone.update(second, disc())
    assert_close(both.compute(), alone.compute())


def test_clips_that_do_not_fit_are_named():
    metric = MattingErrors()
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 32, 40\) and \(1, 1, 3, 32, 40\)"):
        metric.update(disc(4), disc(3))
    with pytest.raises(ValueError, match="goes_on=true, but no piece"):
        metric.update(disc(), disc(), goes_on=True)


def of_rank():
    metric = MattingErrors()
    metric.update(disc(shift=1 + dist.get_rank()), disc())
    return {name: float(value) for name, value in metric.compute().items()}


def test_ranks_count_together():
    both = MattingErrors()
    both.update(torch.cat([disc(shift=1), disc(shift=2)]), torch.cat([disc(), disc()]))
    for found in launch(2, of_rank):
        assert found == pytest.approx({k: float(v) for k, v in both.compute().items()})
