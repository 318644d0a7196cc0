import torch

from acetate.data.order import ClipOrder, MixedOrder, block_shuffle, whole_shares


def test_order_visits_every_clip_once_an_epoch_and_is_pinned():
    order = ClipOrder(7, seed=3)
    epochs = [[order[7 * epoch + i][1] for i in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order[0] == ClipOrder(7, seed=3)[0] and order[15][0] == 2
    # A resumed run relies on this very order.
    assert epochs[0] == [2, 5, 0, 3, 4, 1, 6]


def test_block_shuffle_keeps_the_clips_of_a_block_together():
    tars = torch.tensor([0, 1, 2, 3, 4] * 6)
    order = block_shuffle(tars, 2, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(30))
    blocks = [set(tars[order[start:end]].tolist()) for start, end in ((0, 12), (12, 24), (24, 30))]
    assert [len(block) for block in blocks] == [2, 2, 1] and set.union(*blocks) == set(range(5))
    changes = (tars[order[:12]].diff() != 0).sum()
    assert changes > 1  # shuffled jointly, not one tar after the other


def test_blocks_change_with_the_epoch_and_clips_stand_anywhere():
    order = ClipOrder(12, seed=0, tars=list("aaabbbcccddd"), shuffle_tars=2)
    epochs = [[order[12 * epoch + i][1] for i in range(12)] for epoch in range(300)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    places = torch.tensor([epoch.index(0) for epoch in epochs]).bincount(minlength=12)
    assert places.min() > 10 and places.max() < 45  # 25 expected
    # pairs of four tars
    assert len({frozenset(clip // 3 for clip in epoch[:6]) for epoch in epochs}) == 6


def test_mixed_shares_passes_and_purity():
    sets = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]]
    order = MixedOrder(sets, [1, 3], seed=0)
    assert order.quotas == [3, 7]  # 2.5 and 7.5: the first of equal remainders is rounded up
    places = [order[i] for i in range(70)]
    for epoch in range(7):
        clips = [clip for _, clip in places[10 * epoch : 10 * epoch + 10]]
        assert sum(clip < 7 for clip in clips) == 3
    for clips in sets:
        seen = [place for place in places if place[1] in clips]
        for start in range(0, len(seen) - len(clips) + 1, len(clips)):
            one_pass = seen[start : start + len(clips)]
            assert (
                sorted(clip for _, clip in one_pass) == clips
                and len({epoch for epoch, _ in one_pass}) == 1
            )
    again = MixedOrder(sets, [1, 3], seed=0)
    assert [again[i] for i in reversed(range(70))] == places[::-1]  # whoever asks, whenever
    assert [MixedOrder(sets, [1, 3], seed=1)[i] for i in range(70)] != places


def test_whole_shares():
    assert whole_shares(10, [1, 1, 1]) == [4, 3, 3]
    assert whole_shares(7, [0, 2.5]) == [0, 7]
    assert sum(whole_shares(1001, [0.3, 0.2, 0.7])) == 1001
