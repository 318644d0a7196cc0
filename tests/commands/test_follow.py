import torch
from torch.testing import assert_close

from acetate.commands.follow import figures, held_out, placed, random_paths


def discs(centres, size=32):
    y, x = torch.meshgrid(
        (torch.arange(size) + 0.5) / size, (torch.arange(size) + 0.5) / size, indexing="ij"
    )
    return torch.stack(
        [((x - cx) ** 2 + (y - cy) ** 2 < 0.04).float() for cx, cy in centres.tolist()]
    )[:, None, None]


def test_subjects_that_follow_and_ones_that_do_not():
    centres = torch.tensor([path.centre for path in random_paths(16, seed=0)])
    right = figures(discs(centres), centres, 4)
    assert right["right"] == right["empty border"] == right["subject"] == 1
    assert min(right["correlation x"], right["correlation y"]) > 0.99
    mirrored = figures(discs(1 - centres), centres, 4)
    assert max(mirrored["correlation x"], mirrored["correlation y"]) < -0.99
    full = figures(torch.ones(16, 1, 1, 32, 32) - 1e-3 * torch.rand(16, 1, 1, 32, 32), centres, 4)
    assert full["right"] == full["empty border"] == 0
    assert full["subject"] == 1


def test_prompts_and_paths_are_fixed():
    paths = random_paths(9, seed=0)
    prompts, again = ([clip.prompt for clip in held_out(paths, 1, 24, 24, 4)] for _ in range(2))
    assert prompts == again
    assert len(set(prompts)) == 9
    assert random_paths(3, seed=1) == random_paths(3, seed=1) != random_paths(3, seed=2)


def test_a_clip_placed_by_its_guide_follows_it():
    paths = random_paths(12, seed=4)
    square = torch.zeros(1, 2, 64, 64)
    square[..., 24:40, 24:40] = 1
    alphas = torch.stack([placed(square, path) for path in paths])
    assert alphas.shape == (12, 1, 2, 64, 64)
    area = alphas.mean((1, 2, 3, 4)) / square.mean()
    assert_close(area, torch.tensor([path.axes[0] ** 2 for path in paths]), rtol=0.2, atol=0)
    found = figures(alphas, torch.tensor([path.centre for path in paths]), 4)
    assert found["right"] == 1
    assert min(found["correlation x"], found["correlation y"]) > 0.99
