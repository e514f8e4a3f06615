"""Context profiles: what the network is shown and foretells, and that nothing held out has taught the shipped one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pyhmmer
import pytest
import torch
from safetensors.torch import save

from examples.pfam import profile_training
from examples.pfam.augment import BACKGROUND
from examples.pfam.baselines import blosum62
from examples.pfam.cli import main
from examples.pfam.config import HELDOUT_SAMPLE
from examples.pfam.dataset import read_families
from examples.pfam.encoder import Encoder
from examples.pfam.identity import Known
from examples.pfam.pairs import Family, encode, family_from_alignment
from examples.pfam.profile_hmms import ProfileHmm, read_profile_hmms, taught, without
from examples.pfam.profile_training import AlignedWindows, HmmWindows, cross_entropy, train_profile, windows_of
from examples.pfam.profiles import (
    KINDS,
    REACH,
    SHIPPED,
    WINDOW,
    ContextProfile,
    log_odds,
    save_profiles,
    shipped,
)
from examples.pfam.sampler import PADDING
from examples.pfam.stockholm import read_stockholm

VALIDATION = "pf00004 pf00134 pf00198 pf00278 pf00344 pf00397 pf00684 pf01535 pf02826 pf07679"


def _profile(seed: int = 0) -> ContextProfile:
    torch.manual_seed(seed)
    profile = ContextProfile()
    for weight in profile.state_dict().values():
        weight.normal_(std=0.3)
    return profile


def _hmm(consensus: str, name: str = "A", accession: str = "") -> ProfileHmm:
    return ProfileHmm(name, accession, np.eye(KINDS)[encode(consensus)])


def _family(*rows: str, tmp_path: Path) -> Family:
    text = "# STOCKHOLM 1.0\n#=GF ID F\n" + "".join(f"s{k} {row}\n" for k, row in enumerate(rows)) + "//\n"
    path = tmp_path / "f.sto"
    path.write_text(text)
    (alignment,) = read_stockholm(path)
    return family_from_alignment(alignment)


def test_both_ways_to_the_hidden_layer_agree() -> None:
    profile = _profile()
    residues = torch.randint(0, PADDING + 1, (3, 40 + 2 * REACH))
    torch.testing.assert_close(
        profile.seen_by_sums(residues), profile.seen_by_convolution(residues), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("length", [1, REACH, 2 * REACH, 2 * REACH + 1, 60])
def test_a_profile_is_of_the_window_and_of_nothing_else(length: int) -> None:
    profile = _profile()
    residues = torch.randint(0, 21, (1, length))
    alone = profile(residues)
    torch.testing.assert_close(alone.exp().sum(2), torch.ones(1, length))
    padded = torch.full((2, length + 9), PADDING)
    padded[0, :length], padded[1] = residues[0], 3
    torch.testing.assert_close(profile(padded)[0, :length], alone[0])
    windows = torch.from_numpy(windows_of(residues[0].numpy()).copy())
    torch.testing.assert_close(profile.of_windows(windows), alone[0])
    if length > REACH + 1:  # the first residue does not see the last
        changed = residues.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 20
        assert torch.equal(profile(changed)[0, : length - REACH - 1], alone[0, : length - REACH - 1])
        assert not torch.equal(profile(changed)[0, -REACH - 1], alone[0, -REACH - 1])


def test_log_odds_are_those_of_the_definition() -> None:
    profile, rng = _profile(), np.random.default_rng(0)
    query, key = (torch.from_numpy(rng.integers(0, 21, (1, n))) for n in (7, 5))
    sides = [profile(side).double().exp()[0].numpy() for side in (query, key)]
    itself = np.concatenate([np.eye(20), BACKGROUND[None]])
    p, q = (0.9 * told + 0.1 * itself[side[0]] for told, side in zip(sides, (query, key), strict=True))
    expected = [[np.log((p[i] * q[j] / BACKGROUND).sum()) for j in range(5)] for i in range(7)]
    a, b = (profile.compared(profile(side), side) for side in (query, key))
    np.testing.assert_allclose(log_odds(a, b)[0].numpy(), expected, atol=1e-5)
    torch.testing.assert_close(log_odds(b, a), log_odds(a, b).mT)
    padding = torch.full((1, 3), PADDING)
    assert not profile.compared(profile(padding), padding).any()
    assert not log_odds(a, profile.compared(profile(padding), padding)).any()


def test_scores_are_blosum62_where_there_are_no_profiles() -> None:
    residues = torch.arange(21)[None]
    for profiles in (False, True):
        encoder = Encoder(32, 0.0, profiles)
        if encoder.profile is not None:
            encoder.profile.start()
        side = encoder(residues, torch.tensor([21]))
        found = encoder.substitution(side, side)[0].detach().numpy()
        if not profiles:
            np.testing.assert_allclose(found, blosum62(), atol=2e-5)
            assert side.profile is None
            continue
        assert side.profile is not None and not side.profile.requires_grad
        told = log_odds(side.profile, side.profile)[0].numpy()
        np.testing.assert_allclose(found, 0.6 * blosum62() + 2.8 * told, atol=1e-4)


def test_the_shipped_profiles_know_substitutions_and_neighbours() -> None:
    profile = ContextProfile()
    profile.start()
    torch.manual_seed(0)
    residues = torch.randint(0, 20, (1, 3000))
    told = profile(residues)[0].exp()
    assert told.gather(1, residues.T).mean() > 0.15  # by chance 0.05
    same = [told[residues[0] == kind] for kind in range(20)]
    assert min(float(of_kind.std(dim=0).max()) for of_kind in same) > 0.005  # what surrounds a residue counts


def test_nothing_held_out_taught_the_shipped_profiles() -> None:
    known = Known(shipped().families)
    assert len(shipped().families) > 2000
    assert not [family.key for family in read_families(HELDOUT_SAMPLE) if known.may_hold(family)]
    names = {name for family in shipped().families for name in family}
    assert not names & set(VALIDATION.split(" "))
    assert "pf10417" in names


def test_windows_drawn_from_a_profile_hmm_are_of_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_training, "_SHIFTED", 0.0)
    consensus = "MKVLAGWHPDEYRSTNQCIF"  # each letter once
    drawn = HmmWindows([_hmm(consensus)])
    windows, columns = drawn.draw(500, np.random.default_rng(0))
    letters = encode(consensus)
    assert windows.shape == (500, WINDOW) and columns.shape == (500, KINDS)
    np.testing.assert_array_equal(columns.argmax(axis=1), windows[:, REACH])
    at_ends = 0
    for window in windows:
        (place,) = np.flatnonzero(letters == window[REACH])
        inside = (np.arange(-REACH, REACH + 1) + place >= 0) & (np.arange(-REACH, REACH + 1) + place < len(letters))
        np.testing.assert_array_equal(window[inside], letters[place - REACH + np.flatnonzero(inside)])
        at_ends += bool((window[~inside] == PADDING).any())
        assert (window[~inside] == PADDING).all() or (window[~inside] < KINDS).all()
    assert 100 < at_ends < 300


def test_windows_may_have_runs_inserted_and_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_training, "_SHIFTED", 1.0)
    consensus = "".join("ARNDCQEGHILKMFPSTWYV"[k % 20] for k in range(60))
    windows, columns = HmmWindows([_hmm(consensus)]).draw(300, np.random.default_rng(0))
    np.testing.assert_array_equal(columns.argmax(axis=1), windows[:, REACH])
    inner = windows[(windows < KINDS).all(axis=1)]
    steps = np.diff(inner, axis=1) % 20
    assert ((steps != 1).sum(axis=1) <= 2).mean() > 0.5 and (steps != 1).any()


def test_columns_of_an_alignment_leave_the_sequence_itself_out(tmp_path: Path) -> None:
    family = _family("AC-Dx", "AG-Ey", "W-KDz", tmp_path=tmp_path)
    aligned = AlignedWindows([family])
    # Henikoff's weights of the residues that are matched, over their number.
    own = np.array([(1 / 4 + 1 / 2 + 1 / 4) / 3, (1 / 4 + 1 / 2 + 1 / 2) / 3, (1 / 2 + 1 / 1 + 1 / 4) / 3])
    own /= own.sum()
    rows = [tuple(window[REACH - 1 : REACH + 2]) for window in aligned.windows]
    a, c, d, e, g, w = encode("ACDEGW")
    expected = np.zeros(KINDS)
    expected[a], expected[w] = own[1], own[2]
    np.testing.assert_allclose(aligned.columns[rows.index((PADDING, a, c))], expected / expected.sum(), atol=1e-6)
    assert np.allclose(aligned.columns.sum(axis=1), 1)
    assert len(aligned.windows) == 3 + 2 + 2 + 0 + 1  # of K, and of lower case, there is no other
    assert (w, d) not in [row[1:] for row in rows] and e != g


def test_an_alignment_without_common_columns_teaches_nothing(tmp_path: Path) -> None:
    lone = _family("AC---", "---DE", tmp_path=tmp_path)
    with pytest.raises(ValueError, match="no family has two sequences with residues in one column"):
        AlignedWindows([lone])
    with pytest.raises(ValueError, match="no family has two sequences with residues in one column"):
        cross_entropy(_profile(), [lone])


def test_it_begins_with_what_blosum62_says_of_the_residue_alone() -> None:
    profile = profile_training.beginning()
    joint = BACKGROUND * 2.0 ** (blosum62()[:20, :20] / 2)
    torch.manual_seed(1)
    residues = torch.cat([torch.arange(20), torch.randint(0, 20, (30,))])
    told = profile(residues[None])[0, :20].exp().double()
    np.testing.assert_allclose(told.numpy(), joint / joint.sum(axis=1, keepdims=True), atol=1e-5)


def test_it_learns_what_neighbours_tell(tmp_path: Path) -> None:
    # The middle column of each is told by what stands to its left, and by its own residue not at all.
    half = np.eye(KINDS)[encode("KR")].sum(axis=0) / 2, np.eye(KINDS)[encode("FW")].sum(axis=0) / 2
    other = np.full(KINDS, 1 / KINDS)
    hmms = []
    for name, before, middle in (("a", "G", half[0]), ("b", "P", half[1])):
        left = np.eye(KINDS)[encode(before * 6)]
        columns = np.concatenate([left, middle[None], np.tile(other, (6, 1))])
        hmms.append(ProfileHmm(name, "", columns))
    profile = train_profile(hmms, [], steps=250, seed=0)
    again = train_profile(hmms, [], steps=250, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(profile.buffers(), again.buffers(), strict=True))
    assert not any(weight.requires_grad for weight in profile.buffers())
    for before, letters, middle in (("G", "KR", "K"), ("P", "FW", "F"), ("G", "KR", "A"), ("P", "FW", "A")):
        told = profile(torch.from_numpy(encode(before * 6 + middle + "ACDEHI"))[None]).exp()[0, 6]
        assert told[encode(letters)].sum() > 0.6, (before, middle)
    family = _family("GGGGGGKACDEHI", "GGGGGGRACDEHI", tmp_path=tmp_path)
    assert cross_entropy(profile, [family]) < cross_entropy(train_profile(hmms[1:], [], steps=250, seed=0), [family])
    assert np.isfinite(cross_entropy(train_profile(hmms, [family], steps=3, seed=0), [family]))


def test_families_are_left_out_by_their_accessions(tmp_path: Path) -> None:
    hmms = [_hmm("ACDE", "Kin", "PF00069.9"), _hmm("ACDE", "Other", "PF00070"), _hmm("ACDE", "bare")]
    path = tmp_path / "f.sto"
    heads = ("#=GF ID kinase\n#=GF AC PF00069.31\n", "#=GF ID BARE\n")
    path.write_text("".join(f"# STOCKHOLM 1.0\n{head}a ACD\nb ACE\n//\n" for head in heads))
    kept = without(hmms, read_families(path))
    assert [hmm.name for hmm in kept] == ["Other"]
    assert taught(kept) == [["other", "pf00070"]]


def _write_hmms(path: Path, rows: tuple[str, ...], count: int, kind: str = "amino") -> Path:
    """A file of ``count`` HMMs, made of an alignment."""
    alphabet = getattr(pyhmmer.easel.Alphabet, kind)()
    sequences = [pyhmmer.easel.TextSequence(name=f"s{k}", sequence=row) for k, row in enumerate(rows)]
    builder, background = pyhmmer.plan7.Builder(alphabet), pyhmmer.plan7.Background(alphabet)
    with path.open("wb") as file:
        for number in range(count):
            msa = pyhmmer.easel.TextMSA(name=f"Fam{number}", sequences=sequences).digitize(alphabet)
            hmm, _, _ = builder.build_msa(msa, background)
            hmm.accession = f"PF1234{number}.1"
            hmm.write(file)
    return path


ROWS = ("WYRCHKGG", "WYRCHKAG", "WFRCHKGG")


def test_profile_hmms_are_read_in_our_order(tmp_path: Path) -> None:
    first, second = read_profile_hmms(_write_hmms(tmp_path / "x.hmm", ROWS, 2))
    assert (first.name, first.accession, first.key) == ("Fam0", "PF12340.1", "Fam0 (PF12340.1)")
    assert second.accession == "PF12341.1" and first.columns.shape == (8, 20)
    np.testing.assert_array_equal(first.columns.argmax(axis=1), encode("WYRCHKGG"))
    np.testing.assert_allclose(first.columns.sum(axis=1), 1)


def test_what_are_no_profile_hmms(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.hmm holds HMMs of other letters than amino acids"):
        read_profile_hmms(_write_hmms(tmp_path / "x.hmm", ("ACGTACGT", "ACGTACGA"), 1, "dna"))
    with pytest.raises(FileNotFoundError, match="no profile HMMs at"):
        read_profile_hmms(tmp_path / "absent")
    text = _write_hmms(tmp_path / "z.hmm", ROWS, 1).read_text().splitlines()
    first = next(number for number, line in enumerate(text) if line.split()[:1] == ["1"])
    text[first] = " ".join(["1", *["*"] * 20, *text[first].split()[21:]])
    (tmp_path / "z.hmm").write_text("\n".join(text) + "\n")
    with pytest.raises(ValueError, match=r"z\.hmm holds an HMM, Fam0, whose columns are no probabilities"):
        read_profile_hmms(tmp_path / "z.hmm")
    damaged = _write_hmms(tmp_path / "w.hmm", ROWS, 1)  # which ends the process that reads it
    damaged.write_text("".join(line + "\n" for line in damaged.read_text().splitlines() if not line.startswith("ALPH")))
    with pytest.raises(ValueError, match=r"w\.hmm is not a readable file of profile HMMs: HMMER broke down at it"):
        read_profile_hmms(damaged)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe, which HMMER reads more than once"):
        read_profile_hmms(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="no profile HMMs at"):
        read_profile_hmms("x" * 5000)
    whole = _write_hmms(tmp_path / "y.hmm", ROWS, 2).read_bytes()
    for number, content in enumerate((b"", b"x", b"HMMER3/f [", whole[: len(whole) // 3], b"\0" * 1000, b">a\nMKV\n")):
        path = tmp_path / f"{number}.hmm"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{number}\.hmm (holds no profile HMM|is not a readable file of profile HMMs)"
        ):
            read_profile_hmms(path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hmms, out, data = _write_hmms(tmp_path / "x.hmm", ROWS, 3), tmp_path / "p.safetensors", str(HELDOUT_SAMPLE)
    asked = ["profiles", str(hmms), "--steps", "2", "--quiet", "--threads", "1", "--out", str(out)]
    assert main([*asked, "--data", data, "--eval-data", data, "--without", data]) == 0
    assert "3 profile HMMs (0 left out), 0 alignments (3 left out)\nwrote" in capsys.readouterr().out
    before = out.read_bytes()
    assert main(asked) == 1 and out.read_bytes() == before
    assert "exists; remove it first" in capsys.readouterr().err
    other = [*asked[:-1], str(tmp_path / "q.safetensors")]
    for wrong, reason in ((["--steps", "0"], "--steps must be at least 1"), (["--seed", "-1"], "--seed must be")):
        assert main([*other, *wrong]) == 1
        assert reason in capsys.readouterr().err
    same = tmp_path / "same.sto"
    heads = [f"#=GF ID x{number}\n#=GF AC PF1234{number}.7\n" for number in range(3)]
    same.write_text("".join(f"# STOCKHOLM 1.0\n{head}a ACD\nb ACE\n//\n" for head in heads))
    assert main([*other, "--without", str(same)]) == 1
    assert "--without leaves none of the 3 profile HMMs" in capsys.readouterr().err
    assert main([*other, "--eval-data", "absent"]) == 1 and main([*other, "--data", "absent"]) == 1
    assert capsys.readouterr().err.count("no Stockholm file or directory at absent") == 2
    for option in ("--data", "--without", "--eval-data"):
        with pytest.raises(SystemExit):
            main([*other, option, ""])
        assert f"argument {option}: it is empty" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(other) == 1
    assert "pip install 'pyhmmer" in capsys.readouterr().err


def test_weights_are_saved_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = _profile()
    path = save_profiles(profile, [["a", "pf1"]], tmp_path / "p.safetensors")
    monkeypatch.setattr("examples.pfam.profiles.SHIPPED", path)
    shipped.cache_clear()
    try:
        again = ContextProfile()
        again.start()
        assert shipped().families == (("a", "pf1"),)
    finally:
        shipped.cache_clear()
    for name, weight in profile.state_dict().items():
        assert torch.equal(again.get_buffer(name), weight.half().float())


def test_weights_that_half_precision_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    profile = _profile()
    profile.hidden[3] = 1e6
    with pytest.raises(ValueError, match="not finite in half precision"):
        save_profiles(profile, [], tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def test_shipped_profiles_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    monkeypatch.setattr("examples.pfam.profiles.SHIPPED", path)
    shipped.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match="the shipped context profiles, is missing; the command profiles"):
            ContextProfile().start()
        other = save({"window": torch.zeros(3)}, {"families": "[]"})
        weights = _profile().state_dict()
        lies = [
            save(weights, {"families": text}) for text in ("5", "[1]", "null", '"abc"', '{"a": 1}', "[[1]]", "[" * 9999)
        ]
        lies.append(save({**weights, "hidden": weights["hidden"] * float("nan")}, {"families": "[]"}))
        for content in (b"", b"x" * 100, save({"window": torch.zeros(3)}), other, *lies, SHIPPED.read_bytes()[:5000]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"p\.safetensors is damaged, or of another version \("):
                ContextProfile().start()
    finally:
        shipped.cache_clear()
