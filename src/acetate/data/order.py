"""Infinite orders of clips: pure functions of (seed, position), so that any rank can ask which clip
comes when."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor

from acetate.draws import generator_for, stable_hash

T = TypeVar("T")
Place = tuple[int, int]  # epoch, item


class LastTwo(Generic[T]):
    """Keeps make(epoch) for two epochs: a batch may reach over the end of one."""

    def __init__(self, make: Callable[[int], T]):
        self.make, self.kept = make, OrderedDict[int, T]()

    def __getitem__(self, epoch: int) -> T:
        if epoch not in self.kept:
            self.kept[epoch] = self.make(epoch)
            while len(self.kept) > 2:
                self.kept.popitem(last=False)
        return self.kept[epoch]


class ClipOrder:
    """Orders N clips without end: position p is clip permutation(seed, p // N)[p % N].

    The permutation is a full one; with tars, where tars[i] names that of clip i, it is
    block_shuffle's.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        tars: Sequence[Hashable] | None = None,
        shuffle_tars: int = 1,
    ):
        self.count, self.seed, self.shuffle_tars = count, seed, shuffle_tars
        self.tars: Tensor | None = None
        if tars is not None:
            numbers: dict[Hashable, int] = {}
            self.tars = torch.tensor([numbers.setdefault(tar, len(numbers)) for tar in tars])
        self.epochs = LastTwo(self._epoch)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (epoch, clip) of a position."""
        epoch, place = divmod(position, self.count)
        return epoch, int(self.epochs[epoch][place])

    def _epoch(self, epoch: int) -> Tensor:
        generator = generator_for("order", self.seed, epoch)
        if self.tars is None:
            return torch.randperm(self.count, generator=generator)
        return block_shuffle(self.tars, self.shuffle_tars, generator)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """The values that decide the order beside the seed and the number of clips."""
        return () if self.tars is None else (self.shuffle_tars, *self.tars.tolist())


def block_shuffle(tars: Tensor, width: int, generator: Generator) -> Tensor:
    """Shuffles clips (N,) by the number of each one's tar (N,): the tars in a random order, cut
    into blocks of `width`; the clips of a block, jointly, in a random order.

    Reading it touches at most `width` tars at a time, two blocks at a border. Two clips of one tar
    are always within a block, so at most `width` tars' clips apart; a clip's neighbours are a
    uniform draw from `width` uniformly drawn tars. Blocks are made anew each epoch. From as many
    tars as there are on, this is a full permutation.
    """
    rank = torch.randperm(int(tars.max()) + 1, generator=generator)
    block = rank[tars] // width
    shuffled = torch.randperm(len(tars), generator=generator)
    return shuffled[block[shuffled].argsort(stable=True)]


class MixedOrder:
    """Mixes several data sets by weight.

    An epoch has as many places as there are clips in all. Data set d gets the share weights[d] /
    sum(weights) of them, to the nearest whole clip, the same number every epoch, at places drawn by
    (seed, epoch). It fills them from an order of its own that goes on from epoch to epoch: all of
    its clips come before one comes again, and then they are shuffled anew. sets[d]: the clips of
    data set d; tars and shuffle_tars as in ClipOrder.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        *,
        tars: Sequence[Hashable] | None = None,
        shuffle_tars: int = 1,
    ):
        self.sets, self.weights, self.seed = sets, weights, seed
        self.orders = [
            ClipOrder(
                len(clips),
                stable_hash("set", seed, which),
                tars=None if tars is None else [tars[clip] for clip in clips],
                shuffle_tars=shuffle_tars,
            )
            for which, clips in enumerate(sets)
        ]
        self.count = sum(map(len, sets))
        self.quotas = whole_shares(self.count, weights)
        self.epochs = LastTwo(self._epoch)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """Returns (epoch of the clip's own data set, clip) of a position."""
        epoch, place = divmod(position, self.count)
        chosen, turns = self.epochs[epoch]
        which = int(chosen[place])
        own_epoch, index = self.orders[which][epoch * self.quotas[which] + int(turns[place])]
        return own_epoch, self.sets[which][index]

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Returns the data set of every place, and how many places of it come before."""
        labels = torch.tensor(self.quotas)
        labels = torch.arange(len(labels)).repeat_interleave(labels)
        chosen = labels[
            torch.randperm(self.count, generator=generator_for("mix", self.seed, epoch))
        ]
        turns = torch.empty_like(chosen)
        for which, quota in enumerate(self.quotas):
            turns[chosen == which] = torch.arange(quota)
        return chosen, turns

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """The values that decide the order beside the seed and the number of clips."""
        return (
            *self.weights,
            *map(tuple, self.sets),
            *(order.fingerprint for order in self.orders),
        )


Order = ClipOrder | MixedOrder


def whole_shares(count: int, weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in the proportion of the weights that sum to `count`: the largest
    remainders are rounded up."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


class BucketWalk:
    """Yields global batches of one bucket each, without end.

    Walks the infinite order of all windows and puts each into its bucket's queue; a queue that
    holds a batch gives it away. What is left in the queues stays for the next epoch, so that
    nothing is dropped.
    """

    def __init__(self, buckets: Sequence[Hashable], order: Order):
        self.buckets, self.order, self.position = buckets, order, 0
        self.queues: dict[Hashable, deque[Place]] = defaultdict(deque)

    def batch(self, size: int) -> list[Place]:
        while True:
            epoch, index = self.order[self.position]
            self.position += 1
            queue = self.queues[self.buckets[index]]
            queue.append((epoch, index))
            if len(queue) >= size:
                return [queue.popleft() for _ in range(size)]

    def copy(self) -> "BucketWalk":
        """Returns a walk that goes its own way from here."""
        other = BucketWalk(self.buckets, self.order)
        other.position = self.position
        other.queues.update((bucket, deque(queue)) for bucket, queue in self.queues.items())
        return other
