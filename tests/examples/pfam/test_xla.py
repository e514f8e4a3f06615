"""The Pfam example on XLA devices: static batches and their objective here, whole runs in processes of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import FAST

from examples.pfam import layers, objective, static
from examples.pfam.cli import main
from examples.pfam.config import Config
from examples.pfam.dataset import load_dataset
from examples.pfam.device import Device, on_cpu, open_device
from examples.pfam.layers import diagonal_means
from examples.pfam.model import Aligner, Output
from examples.pfam.sampler import PADDING, Batch, PairSampler

ROOT = Path(__file__).resolve().parents[3]
CONFIG = Config(batch_size=3, cap=40, eval_pairs=1, eval_cap=95, dim=24, dropout=0.0, base_iters=4)
needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="needs torch_xla")


@pytest.fixture(scope="module")
def batch() -> Batch:
    families = load_dataset(CONFIG).train
    return PairSampler(families, size=3, cells=2**40, cap=40, mutation_rate=0.1, indels=0.5, seed=0).batch(0)


def test_padding_is_data_and_changes_no_plan(batch: Batch) -> None:
    full = static.padded(batch, 4, 128)
    assert full.query.shape == full.key.shape == (4, 128) and full.query.dtype == torch.int32
    assert full.pairs == batch.pairs
    assert (full.query[3] == full.query[0]).all() and (full.query[:, 40:] == PADDING).all()
    model = Aligner(CONFIG).eval()
    with torch.no_grad():
        plan, expected = model(full)[1], model(batch)[1]
    for index, pair in enumerate(batch.pairs):
        n, m = len(pair.query), len(pair.key)
        torch.testing.assert_close(plan[index, :n, :m], expected[index, :n, :m], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(plan[index, :n, -1], expected[index, :n, -1], atol=2e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="exceed the shape"):
        static.padded(batch, 2, 128)


def test_the_static_objective_is_the_objective(batch: Batch) -> None:
    full, known = static.padded(batch, 4, 128), static.targets(batch.pairs, 4, 128)
    gradients = []
    for tokens in (False, True):
        torch.manual_seed(0)
        inputs = [torch.rand(shape).requires_grad_() for shape in (*[(4, 129, 129)] * 2, (4, 128, 128), (4,))]
        output = Output(inputs[0], inputs[1], inputs[2], inputs[3])
        if tokens:
            loss = static.training_loss(output, known, 0.15)
        else:
            loss = objective.training_loss(output, full.pairs, 0.15)
        gradients.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_filling_up_has_no_weight(batch: Batch) -> None:
    known = static.targets(batch.pairs, 4, 128)
    for weights in (known.row_weight, known.col_weight, known.row_aligned, known.col_aligned):
        assert not weights[3].any() and weights[:3].any()
    assert not known.share[3].any() and (known.share[:3] > 0).all()
    np.testing.assert_allclose(float(known.row_weight.sum() + known.col_weight.sum()), 1.0, rtol=1e-5)


def test_running_sums_are_the_matrix_of_the_other_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA devices take another road to the same averages; here both are taken on the CPU."""
    maps = torch.randn(2, 3, 11, 7, dtype=torch.float64, requires_grad=True)
    results = []
    for multiplied in (False, True):
        monkeypatch.setattr(layers, "_has_matrix_unit", lambda columns, multiplied=multiplied: multiplied)
        found = diagonal_means(maps, (5, 13))
        (gradient,) = torch.autograd.grad(found.square().sum(), maps)
        results.append((found, gradient))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_buckets() -> None:
    assert [static.bucketed(n) for n in (1, 128, 129, 1024)] == [128, 128, 256, 1024]


def test_the_cpu_keeps_what_it_is_given(batch: Batch) -> None:
    device = Device()
    assert device.place(batch, 3, 40, learning=True).batch is batch
    x = torch.ones(())
    assert on_cpu({"a": [x, 3]}) == {"a": [x, 3]}


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--fsdp 2 is for --device xla, not cpu"):
        open_device("cpu", fsdp=2)
    assert main(["train", "--fsdp", "2", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: --fsdp 2 is for --device xla, not cpu\n"


def test_without_torch_xla_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'torch_sinkhorn_attn\[tpu\]'"):
        open_device("xla")


PROGRAM = """
import sys, tempfile
import torch
from examples.pfam.config import Config
from examples.pfam.device import Device, open_device
from examples.pfam.train import Trainer
from examples.pfam.pair_hmm import Costs, posterior
import torch_xla
import torch_xla.debug.metrics as metrics

torch.set_num_threads(1)
config = Config(
    steps=9, batch_size=2, cap=32, eval_cap=10**6, eval_every=9, save_every=9, dim=24, dropout=0.0, warmup=2,
    base_iters=2, tail_iters=1, rounds=1, train_rounds=1, gradient="tail",
)
Trainer._evaluate_if_due = lambda self, progress: None
folder = tempfile.mkdtemp()
trainer = Trainer(config, folder, device=open_device("xla"))
trainer.run(until=2, progress=False)
compiled = metrics.counter_value("UncachedCompile")
metrics.clear_counters()
trainer.run(until=5, progress=False)
print("compiled", metrics.counter_value("UncachedCompile") or 0)
print("fallbacks", [name for name in metrics.counter_names() if name.startswith("aten::")])
resumed = Trainer.resume(folder)
resumed.run(until=6, progress=False)
straight = Trainer(config, tempfile.mkdtemp())
straight.run(until=6, progress=False)
print("xla", *resumed.history.loss)
print("cpu", *straight.history.loss)
pairs = torch.randn(2, 30, 20), torch.tensor([30, 11]), torch.tensor([20, 17])
costs = Costs(3.0, 0.4, 0.1, (0.4, 0.3, 0.3))
found, expected = (posterior(*(x.to(to) for x in pairs), costs) for to in (torch_xla.device(), "cpu"))
print("posterior", max(float((vars(found)[k].cpu() - x).abs().max()) for k, x in vars(expected).items()))
"""


@pytest.mark.slow
@needs_xla
def test_a_run_is_that_of_the_cpu_and_compiles_once() -> None:
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "OMP_NUM_THREADS": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FAST,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert lines["compiled"] == "0", "a step that varies in lengths and pairs was compiled again"
    assert lines["fallbacks"] == "[]"
    found, expected = ([float(x) for x in lines[name].split()] for name in ("xla", "cpu"))
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert float(lines["posterior"]) < 1e-4


def test_window_reaches_the_attention(batch: Batch) -> None:
    config = dataclasses.replace(CONFIG, window=4)
    with torch.no_grad():
        plan = Aligner(config).eval()(batch)[1]
    n, m = batch.query_lengths[0], batch.key_lengths[0]
    real = plan[0, :n, :m]
    centre = (torch.arange(int(n)) + 0.5) * m / n - 0.5
    outside = (torch.arange(int(m)) - centre[:, None]).abs() > 4
    assert real[~outside].min() > 0 and real[outside].max() == 0
