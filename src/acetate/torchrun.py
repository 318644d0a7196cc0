"""python -m acetate.torchrun --nproc-per-node 8 train.py ...: torchrun for one machine.

The processes of a run meet in a store without a password. PyTorch's listens on every interface of
the machine, whatever address it is given; those of a run on one machine listen on loopback here.
With --nnodes, --rdzv-... or --master-... it is torchrun itself.
"""

import os
import socket
import sys
from datetime import timedelta
from importlib import import_module
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

NAME = "one_machine"
HOST = "127.0.0.1"
MANY = ("--nnodes", "--node", "--rdzv", "--master")  # options of several machines
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


def main() -> None:
    from torch.distributed import run

    registry.register(NAME, start_of)
    given = [text for text in sys.argv[1:] if text != "--standalone"]
    many = any(text.replace("_", "-").startswith(MANY) for text in given)
    run.main(sys.argv[1:] if many else [f"--rdzv-backend={NAME}", *given])


if __name__ == "__main__":
    main()
