import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from acetate.data.endless import background
from acetate.data.synthetic import KINDS, render

SOLID = ("hair", "shadow", "shape")


def premultiplied(clip):
    """(4, T, H, W): colour in [0, 1] times alpha, and alpha."""
    return torch.cat((clip.alpha * (clip.rgb + 1) / 2, clip.alpha))


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_is_a_function_of_kind_and_seed(kind):
    first = render(kind, 3, 5, 32, 48)
    torch.manual_seed(99)
    torch.rand(7)
    state = torch.get_rng_state()
    again = render(kind, 3, 5, 32, 48)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from
    assert torch.equal(first.rgb, again.rgb) and torch.equal(first.alpha, again.alpha)
    assert first.prompt == again.prompt
    other = render(kind, 4, 5, 32, 48)
    assert (premultiplied(first) - premultiplied(other)).abs().mean() > 0.01


def test_kinds_of_one_seed_differ():
    clips = [premultiplied(render(kind, 0, 1, 32, 32)) for kind in KINDS]
    for i, clip in enumerate(clips):
        assert all((clip - other).abs().mean() > 0.01 for other in clips[:i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_ranges_shapes_and_exact_ends(kind, seed):
    clip = render(kind, seed, 5, 64, 80)
    assert clip.kind == kind
    assert clip.rgb.shape == (3, 5, 64, 80) and clip.alpha.shape == (1, 5, 64, 80)
    assert clip.rgb.dtype == clip.alpha.dtype == torch.float32
    assert clip.rgb.is_contiguous() and clip.alpha.is_contiguous()
    assert clip.rgb.isfinite().all() and clip.rgb.abs().max() <= 1
    assert clip.alpha.min() == 0 and clip.alpha.max() <= 1
    assert torch.equal(clip.alpha > 0, (clip.alpha * 255).round() > 0)  # 8 bits keep the support
    if kind in SOLID:
        assert (clip.alpha == 1).flatten(2).float().mean(2).min() > 0.02  # in every frame
        assert ((clip.alpha > 0) & (clip.alpha < 1)).any()
    if kind in ("glass", "smoke"):
        assert clip.alpha.max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_opaque_ignores_the_background(kind):
    clip = render(kind, 1, 3, 64, 64)
    rgb = (clip.rgb + 1) / 2
    red, blue = (torch.tensor(color).view(3, 1, 1, 1) for color in ((1.0, 0, 0), (0, 0, 1.0)))
    over_red, over_blue = (clip.alpha * rgb + (1 - clip.alpha) * color for color in (red, blue))
    opaque, empty = (clip.alpha == 1).expand_as(rgb), (clip.alpha == 0).expand_as(rgb)
    assert torch.equal(over_red[opaque], over_blue[opaque])
    assert torch.equal(over_red[empty], red.expand_as(rgb)[empty])
    assert_close(over_red - over_blue, (1 - clip.alpha) * (red - blue), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_clip_moves(kind, seed):
    frames = premultiplied(render(kind, seed, 9, 64, 64))
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean((0, 2, 3)).min() > 1e-3
    assert (frames[:, -1] - frames[:, 0]).abs().mean() > 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_clip_begins_with_the_shorter_one(kind):
    short, long = render(kind, 2, 3, 32, 32), render(kind, 2, 9, 32, 32)
    assert_close(long.alpha[:, :3], short.alpha, atol=1e-5, rtol=0)
    assert_close(premultiplied(long)[:, :3], premultiplied(short), atol=1e-5, rtol=0)
    assert long.prompt == short.prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_half_the_size_is_the_picture_averaged(kind, seed):
    large, small = render(kind, seed, 3, 192, 256), render(kind, seed, 3, 96, 128)
    averaged = F.avg_pool2d(premultiplied(large).transpose(0, 1), 2).transpose(0, 1)
    error = (averaged - premultiplied(small)).abs()
    # strands and sparks as thin as a pixel
    limit = {"hair": 0.055, "particles": 0.04}.get(kind, 0.012)
    assert error.mean() < limit * averaged[3:].mean()
    assert large.prompt == small.prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_frame_only_adds_to_the_sides(kind):
    wide, square = (
        premultiplied(render(kind, 5, 2, 64, 96)),
        premultiplied(render(kind, 5, 2, 64, 64)),
    )
    assert_close(wide[..., 16:-16], square, atol=1e-4, rtol=0)


def test_edges_of_shapes_are_one_pixel_wide():
    for seed in range(6):
        coarse, fine = (render("shape", seed, 1, size, size).alpha for size in (64, 256))
        partial = [((alpha > 0) & (alpha < 1)).float().mean() for alpha in (coarse, fine)]
        # an outline's share of the pixels falls with their side
        assert 3 < partial[0] / partial[1] < 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_subject_stands_free_of_the_border(kind):
    # (20, T, H, W)
    alphas = torch.stack([render(kind, seed, 5, 64, 64).alpha[0] for seed in range(20)])
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    clear = (alphas[..., edge] == 0).float().mean((1, 2))
    assert clear.median() > 0.95 and clear.min() > 0.6
    cover = (alphas > 0).float().mean((1, 2, 3))
    assert cover.min() > 0.05 and cover.max() < 0.7 and 0.12 < cover.mean() < 0.5
    assert cover.max() > 1.5 * cover.min()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_name_transparency_and_vary(kind):
    prompts = [render(kind, seed, 1, 8, 8).prompt for seed in range(12)]
    assert all(
        prompt.startswith("Transparent background, procedural animation, ") for prompt in prompts
    )
    assert all("close-up: " in p or "medium shot: " in p or "wide shot: " in p for p in prompts)
    assert len(set(prompts)) >= 9


def test_the_shot_size_follows_the_subject():
    cover = {"close-up": [], "wide shot": []}
    for seed in range(40):
        clip = render("shape", seed, 1, 32, 32)
        for shot, areas in cover.items():
            if shot in clip.prompt and " and " not in clip.prompt:
                areas.append((clip.alpha > 0).float().mean())
    assert torch.stack(cover["close-up"]).mean() > 1.2 * torch.stack(cover["wide shot"]).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 50), (2, 50, 3)])
def test_small_and_narrow_clips(kind, size):
    clip = render(kind, 0, *size)
    assert clip.alpha.shape == (1, *size) and clip.rgb.isfinite().all()


def test_unknown_kinds_and_empty_sizes_are_refused():
    with pytest.raises(
        ValueError, match=r"'water'.*hair, glass, smoke, flame, particles, shadow, shape"
    ):
        render("water", 0, 1, 8, 8)
    for name, size in {"frames": (0, 8, 8), "height": (1, 0, 8), "width": (1, 8, -2)}.items():
        with pytest.raises(ValueError, match=f"{name}="):
            render("shape", 0, *size)
        with pytest.raises(ValueError, match=f"{name}="):
            background(0, *size)


def test_backgrounds_are_deterministic_in_range_and_different():
    clips = torch.stack([background(seed, 5, 32, 48)[0] for seed in range(24)])
    assert clips.shape == (24, 3, 5, 32, 48) and clips.isfinite().all() and clips.abs().max() <= 1
    assert torch.equal(clips[7], background(7, 5, 32, 48)[0])
    means = clips.mean((2, 3, 4))
    assert torch.pdist(means).min() > 1e-3 and means.std(0).min() > 0.15
    moving = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4)) > 1e-3
    assert moving.float().mean() > 0.8


def test_backgrounds_keep_their_picture_at_another_size():
    for seed in range(8):
        large, small = (background(seed, 2, side, side)[0] for side in (128, 64))
        averaged = F.avg_pool2d(large.transpose(0, 1), 2).transpose(0, 1)
        assert (averaged - small).abs().mean() < 0.03
