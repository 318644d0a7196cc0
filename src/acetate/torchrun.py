"""python -m acetate.torchrun --nproc-per-node 8 train.py ...: torchrun for one machine.

The processes of a run meet in a store without a password. PyTorch's listens on every interface of
the machine, whatever address it is given; those of a run on one machine listen on loopback here.
With several nodes, or an address that is not loopback, it is torchrun itself.
"""

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

NAME = "one_machine"
HOST = "127.0.0.1"
ONE = ("1", "1:1")  # nodes, of torchrun's options
LOCAL = ("localhost", HOST, "::1")
OF_TORCH = ("static", "c10d")  # meeting places that need no server of their own
TIMEOUT = timedelta(minutes=10)
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_stores: dict[int, TCPStore] = {}  # by port, of this process


def listening(port: int = 0, timeout: timedelta = TIMEOUT) -> TCPStore:
    """Returns a store that this process serves, on loopback alone; port 0: on any free port."""
    if port in _stores:
        return TCPStore(HOST, port, is_master=False, timeout=timeout)
    listener = socket.create_server((HOST, port))
    store = TCPStore(
        HOST,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _stores[store.port] = store
    return store


class OneMachine(StaticTCPRendezvous):
    """Meets as torchrun does on one node, with a store of `listening` for each start of its
    ranks."""

    def get_backend(self) -> str:
        return NAME

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = listening()
        self.master_port = self._store.port
        return super().next_rendezvous()


def start_of(params: RendezvousParameters) -> OneMachine:
    return OneMachine(HOST, 0, 0, 1, params.run_id, int(TIMEOUT.total_seconds()))


def stay_on_this_machine() -> None:
    """Keeps a run on one machine: its first process serves the store, where no launcher does, and
    the sockets of gloo and NCCL are those of loopback, unless the environment says otherwise."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, LOOPBACK)
    os.environ.setdefault("MASTER_ADDR", HOST)
    _rendezvous._create_c10d_store = _create  # it has no other place


_rendezvous = import_module("torch.distributed.rendezvous")  # a function has its name
_torchs_own = _rendezvous._create_c10d_store


def _create(
    host: str, port: int, rank: int, world: int, timeout: timedelta, *more: Any, **others: Any
) -> Store:
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if served or rank or host not in (HOST, "localhost"):
        return _torchs_own(host, port, rank, world, timeout, *more, **others)
    return listening(port, timeout)


def settled(arguments: Sequence[str]) -> Namespace:
    """Reads torchrun's options; a run that needs no other machine by them meets in a store of
    `listening`, whatever port is given."""
    from torch.distributed.run import parse_args

    options = parse_args(arguments)
    host, _ = parse_rendezvous_endpoint(options.rdzv_endpoint or options.master_addr, 0)
    alone = options.nnodes in ONE and options.rdzv_backend in OF_TORCH and host in LOCAL
    if alone or options.standalone:
        options.standalone, options.rdzv_backend, options.rdzv_endpoint = False, NAME, ""
    return options


def main() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import record

    registry.register(NAME, start_of)
    record(run.run)(settled(sys.argv[1:]))


if __name__ == "__main__":
    main()
