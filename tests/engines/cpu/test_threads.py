"""Threads of the CPU engine: counts that change under it, many callers at once, and Ctrl-C. In fresh processes, since
what matters is what a thread did before its first call."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="forks, and reads /proc")

PRELUDE = """
import ctypes, hashlib, os, signal, sys, threading, time
import torch
from torch_sinkhorn_attn import Dustbin, sinkhorn_attention
from torch_sinkhorn_attn.engines import cpu

def digest(length, **options):
    "Of the output and the gradients of a small training step."
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16, generator=g).requires_grad_() for _ in range(3))
    out = sinkhorn_attention(q, k, v, engine="cpu", **options)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
    return hashlib.sha1(b"".join(x.detach().numpy().tobytes() for x in (out, *grads))).hexdigest()

def forked(body):
    "What body() prints, from a child that starts cold; how the child ended, if not well."
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = body()
            code = 0
        except BaseException as error:
            text, code = repr(error), 1
        os.write(w, text.encode())
        os._exit(code)
    os.close(w)
    with os.fdopen(r) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text if status == 0 else f"ended with status {status}: {text}"
"""


def fresh(program: str, **variables: str) -> str:
    """What a program prints in a process of its own; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_counts_that_differ_in_every_direction() -> None:
    """torch keeps one thread count for each thread and for each library that asks: whatever they say, the call is
    sized and run by one number, to the same bits."""
    out = fresh(
        """
        def elsewhere(n):
            t = threading.Thread(target=torch.set_num_threads, args=(n,))
            t.start()
            t.join()

        def openmp(n):
            path = next(line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line)
            ctypes.CDLL(path).omp_set_num_threads(n)

        def limits(n):
            from threadpoolctl import threadpool_limits
            threadpool_limits(limits=n)

        def case(own, how, other, length):
            def body():
                if own:
                    torch.set_num_threads(own)
                    torch.get_num_threads()
                how(other)
                first = digest(length)
                how(own or 1)
                return first if digest(length) == first else "not the same the second time"
            return body

        hows = [elsewhere, limits] + ([openmp] if sys.platform == "linux" else [])
        counts = (None, 5), (1, 16), (2, 1), (2, 3), (2, 64), (64, 9)
        for length in (40, 700):  # one thread's, and shared
            found = {}
            for how in hows:
                for own, other in counts[:3] if length == 40 else counts:
                    found.setdefault(forked(case(own, how, other, length)), []).append((how.__name__, own, other))
            print(length, found)
            assert len(found) == 1, found
        """
    )
    assert len(out.splitlines()) == 2


@pytest.mark.slow
def test_one_to_sixty_four_threads_give_the_same_bits() -> None:
    fresh(
        """
        bins = {"dustbin": Dustbin(0.0, 0.0), "tail_iters": 3, "over_relaxation": 1.2}
        for options in ({}, {"window": (70, 70)}, bins):
            found = set()
            for threads in (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64):
                torch.set_num_threads(threads)
                found.add(digest(500, base_iters=4, **options))
            assert len(found) == 1, options
        """
    )


@pytest.mark.slow
def test_many_callers_share_one_budget() -> None:
    """Eight Python threads at once keep no more tiles than one: the resident set shows it."""
    fresh(
        """
        length, callers, tiles = 1500, 8, 1500 * 1500 * 4
        torch.set_num_threads(1)
        cpu.set_workspace_budget(tiles)
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, length, 16, generator=g) for _ in range(3))
        found = [None] * callers

        def attend(i):
            found[i] = sinkhorn_attention(q, k, v, engine="cpu", base_iters=8)

        def resident(name):
            line = next(x for x in open("/proc/self/status") if x.startswith(name))
            return int(line.split()[1]) * 1024

        attend(0)
        before = resident("VmRSS")
        threads = [threading.Thread(target=attend, args=(i,)) for i in range(callers)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert all(torch.equal(x, found[0]) for x in found)
        grown = resident("VmHWM") - before
        assert grown < 3 * tiles, f"{grown / tiles:.1f} times the budget"  # 7 or 8 without a common cap
        """
    )


HEARS = """
length, threads = {length}, {threads}
torch.set_num_threads(threads)
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 1, length, 16, generator=g).requires_grad_() for _ in range(3))

def ring(after):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()

def forward(**options):
    return sinkhorn_attention(q, k, v, engine="cpu", **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_long_calls_hear_an_interrupt(threads: int) -> None:
    program = """
        from torch_sinkhorn_attn import sinkhorn_plan
        out = forward(base_iters=1, gradient="implicit", epsilon=0.03)
        for long in (  # each takes a minute or more
            lambda: forward(base_iters=100_000),
            lambda: sinkhorn_plan(q, k, engine="cpu", base_iters=100_000),
            lambda: torch.autograd.grad(out.sin().sum(), (q, k, v)),  # 500 iterations of conjugate gradients
        ):
            started, delay = time.monotonic(), 0.3
            ring(delay)
            try:
                long()
            except KeyboardInterrupt:
                late = time.monotonic() - started - delay
                assert late < 2, late  # one second, and what a loaded machine adds
            else:
                raise AssertionError(f"not heard in {time.monotonic() - started} s")
        forward()  # and the next call is as ever
        """
    fresh(HEARS.format(length=4000, threads=threads) + textwrap.dedent(program))


@pytest.mark.slow
def test_a_handler_that_does_not_raise_loses_nothing() -> None:
    fresh(
        HEARS.format(length=900, threads=2)
        + textwrap.dedent(
            """
            rung = []
            expected = forward(base_iters=300)
            signal.signal(signal.SIGINT, lambda *_: rung.append(1))
            ring(0.05)
            for _ in range(1000):
                assert torch.equal(forward(base_iters=300), expected)
                if rung:
                    break
            assert rung
            """
        )
    )
