"""Training pairs of examples/pfam per second, by the engine of its attention, in one run.

    python benchmarks/aligner.py [--threads 2] [--repeat 3]

A step is forward, loss and backward of a batch of 8 pairs of the shipped families, longer sides cropped to the length;
the whole model, three attentions a pair. "cpu" is the compiled engine, "reference" the dense definition, differentiated
by autograd. Engines take turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from lib.measure import print_rows

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.pfam.config import Config
from examples.pfam.dataset import load_dataset
from examples.pfam.model import Aligner
from examples.pfam.objective import training_loss
from examples.pfam.sampler import Batch, PairSampler

SIZE = 8
CASES = [(engine, gradient) for engine in ("cpu", "tiled", "reference") for gradient in ("tail", "implicit")]


def seconds(model: Aligner, batch: Batch) -> float:
    """One step."""
    model.zero_grad()
    start = time.perf_counter()
    training_loss(model(batch), batch.pairs, model.config.barycentre_weight).backward()
    return time.perf_counter() - start


def rates(length: int, repeat: int) -> list[float]:
    """Pairs per second of each of ``CASES``."""
    config = Config()
    sampler = PairSampler(
        load_dataset(config).train, size=SIZE, cells=2**40, cap=length, mutation_rate=0.3, indels=0.5, seed=0
    )
    batches = [sampler.batch(step) for step in range(repeat)]
    models = []
    for engine, gradient in CASES:
        torch.manual_seed(0)
        model = Aligner(Config(gradient=gradient)).train()
        model.engine = engine
        seconds(model, batches[0])  # warms up
        models.append(model)
    taken = [[seconds(model, batch) for model in models] for batch in batches]
    return [SIZE / statistics.median(column) for column in zip(*taken, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [f"{engine}, {gradient}" for engine, gradient in CASES]
    widths = (14, *(max(len(name), 8) for name in names))
    print_rows([["pairs/s, length", *names]], widths)
    for length in (96, 192, 320):
        print_rows([[str(length), *(f"{rate:.1f}" for rate in rates(length, options.repeat))]], widths)


if __name__ == "__main__":
    main()
