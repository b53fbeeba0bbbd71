"""Saved shards against the whole tensors that they were cut from, and AdamW's state against its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo.engine import ranks as ranks_module
from fastgrpo.engine.fragments import Fragment, make_state, steps_of, to_host, views_of
from fastgrpo.engine.options import EngineOptions
from fastgrpo.engine.shards import SavedShards, Shard, write_shard
from fastgrpo.engine.zero import load_scaler_state, scaler_state

NUMBERS = {"optimizer_steps": 3, "shapes": {"w": [5, 5]}, "loss_scaler": {"cur_scale": 2.0**24}}
WHOLE = torch.arange(25.0) / 7


def write(folder: Path, *stretches: tuple[int, int], numbers: dict = NUMBERS) -> list[Path]:
    """A file for each (start, stop) of WHOLE; an empty one holds no tensor, as those of stage 0 do."""
    files = []
    for rank, (start, stop) in enumerate(stretches):
        tensors = {"master/w": WHOLE[start:stop].clone()} if stop > start else {}
        files.append(folder / f"rank_{rank:05d}.safetensors")
        write_shard(Shard(tensors, {name: start for name in tensors}, numbers), files[-1])
    return files


@pytest.mark.parametrize(
    "stretches",
    [[(0, 25)], [(0, 25), (0, 0)], [(13, 25), (0, 13)], [(0, 4), (4, 5), (5, 24), (24, 25)], [(0, 20), (3, 9), (5, 25)]],
)
def test_every_stretch_is_read_from_whatever_covers_it(tmp_path: Path, stretches: list[tuple[int, int]]) -> None:
    saved = SavedShards(write(tmp_path, *stretches))
    assert saved.numbers == NUMBERS and saved.names == ["master/w"]
    for start in range(25):
        for stop in range(start, 26):
            read = saved.read("master/w", start, stop - start)
            assert torch.equal(read, WHOLE[start:stop]) and read.dtype == torch.float32


def test_what_no_file_covers_is_told(tmp_path: Path) -> None:
    saved = SavedShards(write(tmp_path, (0, 10), (12, 25)))
    assert torch.equal(saved.read("master/w", 12, 13), WHOLE[12:])
    with pytest.raises(
        ValueError, match=r"element 10 of master/w is in none of .*rank_00000.*rank_00001.*restore the files"
    ):
        saved.read("master/w", 5, 20)
    with pytest.raises(ValueError, match="element 25 of master/w is in none"):
        saved.read("master/w", 20, 6)
    with pytest.raises(ValueError, match="element 0 of exp_avg/w is in none"):
        saved.read("exp_avg/w", 0, 1)


def test_equal_shards_are_equal_files(tmp_path: Path) -> None:
    numbers = [NUMBERS, dict(reversed(NUMBERS.items()))]
    contents = []
    for i in range(8):
        (file,) = write(tmp_path, (3, 25), numbers=numbers[i % 2])
        contents.append(file.read_bytes())
    assert len(set(contents)) == 1


def test_what_is_no_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of a saved state"):
        SavedShards([])
    with pytest.raises(FileNotFoundError, match="gone"):
        SavedShards([tmp_path / "gone"])
    (whole,) = write(tmp_path, (0, 25))
    bad = tmp_path / "bad.safetensors"
    contents = {"half of it": whole.read_bytes()[:-20], "no safetensors": b"a text", "empty": b""}
    for content in contents.values():
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors is not a whole shard"):
            SavedShards([bad])
    for metadata in (None, {"fastgrpo_shard": "no JSON"}, {"fastgrpo_shard": '{"starts": {}}'}, {"fastgrpo_shard": "[]"}):
        save_file({"master/w": WHOLE}, bad, metadata)
        with pytest.raises(ValueError, match="bad.safetensors is not a whole shard"):
            SavedShards([bad])
    for tensor, starts in ((WHOLE.view(5, 5), {"master/w": 0}), (WHOLE.half(), {"master/w": 0}), (WHOLE, {})):
        write_shard(Shard({"master/w": tensor}, starts, NUMBERS), bad)
        with pytest.raises(ValueError, match="bad.safetensors is not a shard .*flat float32"):
            SavedShards([bad])


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    files = write(old, (0, 10)) + write(new, (10, 25), numbers=NUMBERS | {"optimizer_steps": 4})
    with pytest.raises(ValueError, match=r"new.*and .*old.* are not of one save; restore"):
        SavedShards(files)


def adamw(*tensors: Tensor) -> SimpleNamespace:
    """As much of DeepSpeed's engine in stage 0 as there is to it."""
    return SimpleNamespace(basic_optimizer=torch.optim.AdamW(tensors), zero_optimization_stage=lambda: 0)


def test_the_state_is_made_as_adamw_makes_it() -> None:
    """Also for a weight that is not in one piece in memory, which the moments follow."""
    first, second = (torch.randn(4, 6).t().requires_grad_() for _ in range(2))
    stepped, made = adamw(first), adamw(second)
    assert steps_of(made) == 0
    make_state(made, 0)
    assert not made.basic_optimizer.state
    for _ in range(3):
        first.grad = torch.ones_like(first)
        stepped.basic_optimizer.step()
    make_state(made, 3)
    assert steps_of(made) == steps_of(stepped) == 3
    own, theirs = made.basic_optimizer.state[second], stepped.basic_optimizer.state[first]
    assert own.keys() == theirs.keys() and torch.equal(own["step"], theirs["step"])
    for key, tensor in theirs.items():
        assert (own[key].dtype, own[key].shape, own[key].stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    views = views_of([Fragment("w", 0, 24, second, 0)], made)
    with torch.no_grad():
        for _, view in views.values():
            view.copy_(torch.arange(24.0).view(6, 4))
    host = to_host({key: view for key, (_, view) in views.items()})
    assert all(torch.equal(tensor, torch.arange(24.0)) for tensor in host.values()) and len(host) == 3
    assert torch.equal(second.detach(), torch.arange(24.0).view(6, 4)) and torch.equal(own["exp_avg"], second.detach())


def test_a_moving_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own scaler for float16, against one that was never interrupted."""
    ranks_module.load_deepspeed()
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    options = EngineOptions(zero_stage=1, dtype=torch.float16, learning_rate=1e-4)
    read = DeepSpeedFP16Config(**options.deepspeed_config([torch.nn.Parameter(torch.zeros(2))])["fp16"])

    def make(dtype: torch.dtype):
        return loss_scaler.CreateLossScaler(dtype, 0, True, read.dynamic_loss_scale_args())

    overflows = [False, True, *[False] * 1200, True, *[False] * 1100]
    for cut in (1, 2, 900, 1202, 1203, 2000):
        uninterrupted, before, after = (make(torch.float16) for _ in range(3))
        for overflow in overflows[:cut]:
            before.update_scale(overflow)
        load_scaler_state(after, scaler_state(before))
        for overflow in overflows[cut:]:
            after.update_scale(overflow)
        for overflow in overflows:
            uninterrupted.update_scale(overflow)
        assert scaler_state(after) == scaler_state(uninterrupted) and after.loss_scale == 2.0**24
    still = make(torch.bfloat16)
    load_scaler_state(still, scaler_state(before))
    assert scaler_state(still) == {} and still.loss_scale == 1.0
    load_scaler_state(None, scaler_state(before))
    load_scaler_state(after, scaler_state(None))
    assert scaler_state(after) == scaler_state(uninterrupted)
