"""Damaged copies of sound files, and what reading one in a process of its own comes to."""

import copy
import faulthandler
import json
import os
import pickle
import resource
import signal
import struct
from dataclasses import dataclass
from random import Random

import torch

SECONDS, BYTES = 10, 2**31
SLEEPING = 10  # times as long by the clock as by the processor, which a busy machine does not slow
VALUES = (
    None, True, False, -1, 0, 1, 1.5, 10**6, 10**9, 2**63, 10**30, 1e308, float("nan"),
    float("inf"), "", "x", "9", "../../x", "a\nb", "\x00", "\ud800", "x" * 10**5, [], {}, [[]],
    [1], ["x"], {"x": 1}, [0] * 1000, {"kind": None}, "1" * 5000, "NaN", "[" * 5000,
)  # fmt: skip


def places(value, path=()):
    """Paths of everything inside of nested objects and lists."""
    found = []
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for name, inner in pairs:
        found += [(*path, name), *places(inner, (*path, name))]
    return found


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def edited(value, random):
    """A copy with a few places deleted, doubled or of another value."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        found = [path for path in places(value) if path]
        if not found:
            return value
        depth = random.randint(1, max(map(len, found)))
        *path, last = random.choice([path for path in found if len(path) <= depth])
        held = value
        for name in path:
            held = held[name]
        if isinstance(held, tuple):
            continue
        kind = random.randrange(6)
        if kind == 0:
            del held[last]
        elif kind == 1 and isinstance(held, dict):
            held[f"{last}x"] = held[last]
        elif kind == 2:
            held[last] = deep(random.choice((20, 60, 400)))
        elif kind == 3 and type(held[last]) in (int, float):
            held[last] *= random.choice((-1, 0, 10**9, 1.5, float("nan")))
        else:
            held[last] = random.choice(VALUES)
    return value


def flipped(data, random):
    """Bytes that are cut off, flipped, or hold what is nested without end."""
    kind, data = random.randrange(4), bytearray(data)
    if kind == 0:
        return bytes(data[: random.randrange(len(data))])
    if kind == 1:
        at = random.randrange(len(data))
        return bytes(data[:at] + random.choice((b"[", b'{"a":', b"\xff")) * 10**5 + data[at:])
    for _ in range(random.choice((1, 4, 1 + len(data) // 500))):
        at = random.randrange(len(data) if kind == 2 else min(len(data), 400))
        data[at] ^= 1 << random.randrange(8)
    return bytes(data)


def damaged_json(data, random):
    if random.random() < 0.3:
        return flipped(data, random)
    return json.dumps(edited(json.loads(data), random)).encode()


def damaged_safetensors(data, random):
    if random.random() < 0.3:
        return flipped(data, random)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    facts = header.get("__metadata__")
    if facts and random.random() < 0.6:
        name = random.choice(list(facts))
        if random.random() < 0.2:
            del facts[name]
        else:
            facts[name] = random.choice(
                (*map(str, VALUES), *map(json.dumps, VALUES), "[" * 5000, "9" * 5000)
            )
    else:
        header = edited(header, random)
    text = json.dumps(header).encode()
    body = bytearray(data[8 + size :])
    if random.random() < 0.2:
        at = random.randrange(len(body) // 4) * 4
        body[at : at + 4] = b"\xff\xff\xff\xff"  # NaN
    return struct.pack("<Q", len(text)) + text + bytes(body)


@dataclass
class Outcome:
    said: str  # accepted, refused: ..., or what else was raised
    seconds: float  # of the processor
    grown: int  # bytes

    @property
    def sound(self):
        return (
            self.said.startswith(("accepted", "refused"))
            and self.seconds < SECONDS
            and self.grown < BYTES
        )


def outcome_of(action, name):
    """What `action` comes to in a process of its own. name: of the file, that errors have."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _child(action, name, write)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    _, status, used = os.wait4(child, 0)
    if os.WIFEXITED(status):
        said, grown = pickle.loads(data)
    else:
        said, grown = f"ended by {os.WTERMSIG(status)} at {data.decode()}", 0
    return Outcome(said, used.ru_utime + used.ru_stime, grown)


def _child(action, name, write):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SLEEPING * SECONDS)
    torch.set_num_threads(1)  # a fork has none of the threads of its parent's pool
    faulthandler.dump_traceback_later(SLEEPING * SECONDS - 1, file=write)
    before = _peak()
    limit = 16 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        said = "accepted"
        action()
    except (ValueError, FileNotFoundError, OSError) as error:
        ours = type(error) in (ValueError, OSError, FileNotFoundError) or type(
            error
        ).__module__.startswith("acetate")
        named = name in str(error)
        said = f"{'refused' if ours and named else 'unnamed'}: {type(error).__name__}: {error}"[
            :600
        ]
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-4:]
        said = f"raised {type(error).__name__}: {str(error)[:300]} at {[*map(str, where)]}"
    faulthandler.cancel_dump_traceback_later()
    with open(write, "wb") as pipe:
        pipe.write(pickle.dumps((said, _peak() - before)))
    os._exit(0)


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seeded(seed):
    return Random(seed)
