"""Stores: what is read back is what memory would hold; made once, anew when the source changes, whole or absent."""

from __future__ import annotations

import dataclasses
import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from examples.pfam import streaming
from examples.pfam.config import TRAIN_SAMPLE, Config
from examples.pfam.dataset import load_dataset
from examples.pfam.pairs import Family, family_from_alignment
from examples.pfam.stockholm import StockholmError, read_stockholm
from examples.pfam.streaming import StoredChains, default_cache, stored_families
from examples.pfam.train import Trainer

RECORD = "# STOCKHOLM 1.0\n#=GF ID   {}\n#=GF AC   PF1.2\n{}//\n"
MIXED = "long/1-4     ..AcDE-~\n" + "b\xe9ta         -XuB..WY\n" + "gaps         ........\n"
SMALL = Config(steps=4, batch_size=2, cap=32, eval_cap=95, eval_pairs=1, eval_every=0, dim=24)


def same(first: Family, second: Family) -> bool:
    return (first.name, first.accession) == (second.name, second.accession) and all(
        a.name == b.name
        and all(
            np.array_equal(getattr(a, part), getattr(b, part)) and getattr(a, part).dtype == getattr(b, part).dtype
            for part in ("residues", "columns", "matched")
        )
        for a, b in zip(first.sequences, second.sequences, strict=True)
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "few.sto"
    one = "only         ACDEF\n"
    path.write_text(RECORD.format("Mixed", MIXED) + RECORD.format("One", one), encoding="latin-1")
    return path


def test_what_is_stored_is_what_memory_would_hold(source: Path, tmp_path: Path) -> None:
    for path in (source, TRAIN_SAMPLE):
        expected = [family_from_alignment(alignment) for alignment in read_stockholm(path)]
        found = stored_families(path, tmp_path / "cache")
        assert len(found) == len(expected)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    names = [chain.name for chain in stored_families(source, tmp_path / "cache")[0].sequences]
    assert names == ["long/1-4", "b\xe9ta"]  # the row of gaps is left out


def test_stored_sequences_are_a_sequence(tmp_path: Path) -> None:
    chains = stored_families(TRAIN_SAMPLE, tmp_path)[0].sequences
    names = [chain.name for chain in chains]
    assert chains[-1].name == names[-1] and len(chains) == len(names)
    part = chains[1:4]
    assert isinstance(part, StoredChains) and [chain.name for chain in part] == names[1:4]
    assert len(chains[:None]) == len(names) and len(chains[3:2]) == 0
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError, match=f"sequence {index} of {len(names)}"):
            chains[index]
    with pytest.raises(ValueError, match="a step of 2"):
        chains[::2]


def test_a_store_is_made_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    stored_families(source, cache)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "read_stockholm", None)  # calling it would be a TypeError
        assert stored_families(source, cache)[0].name == "Mixed"
    status = source.stat()
    source.write_text(source.read_text("latin-1").replace("Mixed", "Fixed"), encoding="latin-1")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))  # the head tells, if nothing else does
    assert stored_families(source, cache)[0].name == "Fixed"
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    stored_families(source, cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damaged", ["chains.bin", "chains.idx", "families.json"])
def test_a_damaged_store_is_made_anew(source: Path, tmp_path: Path, damaged: str) -> None:
    cache = tmp_path / "cache"
    stored_families(source, cache)
    (folder,) = cache.iterdir()
    os.truncate(folder / damaged, 10)
    expected = [family_from_alignment(alignment) for alignment in read_stockholm(source)]
    assert all(same(a, b) for a, b in zip(stored_families(source, cache), expected, strict=True))
    assert list(cache.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = source.read_text("latin-1")
    source.write_text(whole + "# STOCKHOLM 1.0\nx ACD", encoding="latin-1")
    with pytest.raises(StockholmError, match="ends inside the record"):
        stored_families(source, cache)
    far = f"a            A{'-' * 70_000}C\n"
    source.write_text(RECORD.format("Far", far))
    with pytest.raises(ValueError, match="the row of a has a gap of more than 65535 columns"):
        stored_families(source, cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot convert .*few\.sto into --cache .*file .*choose another folder"):
        stored_families(source, tmp_path / "file")


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "torch_sinkhorn_attn" / "pfam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().parent.parent == Path.home() / ".cache"


def test_training_from_disk_is_training_from_memory(tmp_path: Path) -> None:
    memory, disk = (dataclasses.replace(SMALL, stream_from=size) for size in (16, 0))
    trainers = [Trainer(config, tmp_path / "run", cache=tmp_path / "cache") for config in (memory, disk)]
    kinds = [type(trainer.dataset.train[0].sequences) for trainer in trainers]
    assert kinds == [tuple, StoredChains]
    for trainer in trainers:
        trainer.run(until=3, progress=False)
    assert trainers[0].history.loss == trainers[1].history.loss
    limited = dataclasses.replace(disk, max_families=5, max_sequences=3, eval_data=None, eval_cap=999)
    found, expected = (
        load_dataset(config, tmp_path / "cache") for config in (limited, dataclasses.replace(limited, stream_from=16))
    )
    assert found.summary() == expected.summary()
    assert all(same(a, b) for a, b in zip(found.train, expected.train, strict=True))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_families(tmp_path: Path) -> None:
    rows = "".join(f"s{k:03}         {'ACDEFGHIKLMNPQRSTVWY' * 10}\n" for k in range(100))
    peaks = []
    for count in (3, 30):
        path = tmp_path / f"{count}.sto.gz"
        path.write_bytes(gzip.compress("".join(RECORD.format(f"F{k}", rows) for k in range(count)).encode()))
        tracemalloc.start()
        families = stored_families(path, tmp_path / "cache")
        assert sum(len(chain) for family in families for chain in family.sequences) == count * 20_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
