"""Which checkpoint counts as the newest, what is pruned, and how identities differ."""

import pytest

from cp_gdn.train.checkpoint import Checkpoints, differences, newest
from cp_gdn.train.topology import open_topology
from tests.distributed import run_ranks


class FakeEngine:
    def save_checkpoint(self, folder, tag, save_latest):
        assert not save_latest


class BrokenEngine:
    def save_checkpoint(self, folder, tag, save_latest):
        raise RuntimeError("the disk is full")


def save_steps(rank, size, folder, steps, keep):
    with open_topology(None) as topology:
        checkpoints = Checkpoints(folder, topology, identity={"model": 1}, keep=keep)
        for step in steps:
            checkpoints.save(FakeEngine(), {"step": step}, step=step)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_only_the_last_ones_stay(tmp_path):
    run_ranks(2, save_steps, tmp_path, (1, 2, 3, 4), 2)
    assert names(tmp_path) == ["latest", "step-000000003", "step-000000004"]
    assert names(tmp_path / "step-000000004") == [
        "complete",
        "random-rank00000.pt",
        "random-rank00001.pt",
        "run.json",
    ]


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    run_ranks(1, save_steps, tmp_path, (1, 2), 2)
    assert newest(tmp_path).name == "step-000000002"
    (tmp_path / "step-000000002" / "complete").unlink()
    assert newest(tmp_path).name == "step-000000001"
    (tmp_path / "step-000000003.tmp").mkdir()
    (tmp_path / "step-000000003.tmp" / "complete").touch()
    assert newest(tmp_path / "absent") is None


def test_a_temporary_folder_never_counts(tmp_path):
    leftover = tmp_path / "step-000000003.tmp"
    leftover.mkdir()
    (leftover / "complete").touch()  # killed between the marker and the rename
    assert newest(tmp_path) is None
    run_ranks(1, save_steps, tmp_path, (3,), 1)
    assert names(tmp_path) == ["latest", "step-000000003"]


def break_while_saving(rank, size, folder):
    with open_topology(None) as topology:
        checkpoints = Checkpoints(folder, topology, identity={}, keep=1)
        checkpoints.save(FakeEngine(), {"step": 1}, step=1)
        with pytest.raises(RuntimeError, match="disk is full"):
            checkpoints.save(BrokenEngine(), {"step": 2}, step=2)


def test_a_failed_save_leaves_the_previous_one_in_charge(tmp_path):
    run_ranks(1, break_while_saving, tmp_path)
    assert newest(tmp_path).name == "step-000000001"


def unreadable(rank, size, folder):
    with open_topology(None) as topology:
        try:
            Checkpoints(folder, topology, identity={}, keep=1).find()
        except ValueError as error:
            return str(error)


def test_what_the_first_rank_cannot_read_every_rank_refuses(tmp_path):
    run_ranks(1, save_steps, tmp_path, (1,), 1)
    (tmp_path / "step-000000001" / "run.json").write_text("{")
    first, second = run_ranks(2, unreadable, tmp_path)
    assert first == second
    assert "could not read the checkpoint" in first


class DamagedEngine(FakeEngine):
    def load_checkpoint(self, folder, tag):
        raise RuntimeError("failed finding central directory")


def damaged(rank, size, folder):
    with open_topology(None) as topology:
        checkpoints = Checkpoints(folder, topology, identity={}, keep=1)
        with pytest.raises(
            ValueError, match=r"step-000000001 \(RuntimeError: failed .* delete that"
        ):
            checkpoints.load(DamagedEngine(), "step-000000001")


def test_a_damaged_file_is_told_with_its_checkpoint(tmp_path):
    run_ranks(1, damaged, tmp_path)


def test_differences_are_named_by_leaf():
    saved = {"model": {"hidden": 1, "layers": 2}, "gone": 3}
    mine = {"model": {"hidden": 4, "layers": 2}, "new": 5}
    assert differences(saved, mine) == [
        "gone is None but was 3",
        "model.hidden is 4 but was 1",
        "new is 5 but was None",
    ]
    assert differences(saved, saved) == []
