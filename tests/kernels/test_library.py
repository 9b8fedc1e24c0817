"""Kernels are compiled once, and where they cannot be, nothing breaks."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finedetr.kernels import library as room
from finedetr.kernels.attention import attention
from finedetr.model.detector import Detector
from finedetr.model.zoo import variant
from tests.kernels import test_attention, test_deformable, test_depthwise, test_normalization


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has compiled nothing yet, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(room, "_given_up", set())
    caches = (room.library, room._compiler, room._own_folder)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def files(folder: Path) -> list[Path]:
    """What the cache holds."""
    return sorted((folder / "finedetr" / "kernels").iterdir())


def test_a_kernel_is_compiled_once_for_all_processes(fresh: Path) -> None:
    assert room.library("attention", HEAD=16) is not None
    (first,) = files(fresh)
    before = first.stat().st_mtime_ns
    room.library.cache_clear()
    assert room.library("attention", HEAD=16) is not None
    assert room.library("attention", HEAD=32) is not None
    assert first in files(fresh)
    assert first.stat().st_mtime_ns == before
    assert len(files(fresh)) == 2  # and nothing of what came between


def test_a_kept_file_that_cannot_be_loaded_is_made_again(fresh: Path) -> None:
    code = "from finedetr.kernels.library import library; assert library('normalization')"
    for _ in range(2):  # each in a process of its own: one that has a library does not open it again
        run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (kept,) = files(fresh)
        assert kept.stat().st_size > 1000
        kept.write_bytes(b"of another system")


def test_a_machine_says_whether_it_has_them(fresh: Path) -> None:
    assert room.state().startswith("compiled by")
    assert files(fresh)


def test_off_is_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEDETR_KERNELS", "off")
    assert "FINEDETR_KERNELS" in room.state()
    assert room.library("attention", HEAD=16) is None
    assert attention(torch.randn(1, 4, 32), torch.randn(1, 4, 16), None, 1) is None
    assert not (fresh / "finedetr").exists()


def test_without_a_compiler_torch_answers_and_nothing_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert room.library("attention", HEAD=16) is None
        assert "want of a C compiler" in room.state()


def test_a_compiler_that_fails_is_named_once_with_what_it_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(RuntimeWarning, match="broken-cc.*no such header"):
        assert room.library("attention", HEAD=16) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert room.library("attention", HEAD=16) is None
        assert room.library("normalization") is None
        assert "broken-cc could not compile" in room.state()
    assert files(fresh) == []


def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = fresh / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert room.library("attention", HEAD=16) is not None
    assert len(list(room._own_folder().iterdir())) == 1


def test_the_folder_of_a_process_goes_with_it(fresh: Path) -> None:
    (fresh / "file").write_text("", encoding="utf-8")
    code = "from finedetr.kernels.library import library, _own_folder; assert library('attention', HEAD=16); "
    environment = {**os.environ, "XDG_CACHE_HOME": str(fresh / "file")}
    run = subprocess.run(
        [sys.executable, "-c", code + "print(_own_folder())"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.strip()).exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a processor of that kind")
def test_processors_with_shorter_vectors_get_the_same(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "FLAGS", tuple("-march=haswell" if f.startswith("-march") else f for f in room.FLAGS))
    for dtype in (torch.float32, torch.bfloat16):
        test_attention.test_attention_is_that_of_plain_torch(dtype, 32, 75, 33)
        test_deformable.test_the_sum_is_that_of_plain_torch(dtype, (3, 6, 3, 5), 32, 4)
        test_normalization.test_all_of_it_is_that_of_plain_torch(dtype, 48, "relu", -0.7)
        test_normalization.test_all_of_it_is_that_of_plain_torch(dtype, 8, "silu", None)
    test_depthwise.test_it_is_that_of_plain_torch(48, 5, 2, 1)
    assert len(files(fresh)) == 4


@pytest.mark.parametrize("norms", [False, True])
def test_a_whole_detector_trains_alike_with_and_without(norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    results = []
    for asked in (True, False):
        if not asked:
            for name in ("attention.attention", "deformable.deformable_sum"):
                monkeypatch.setattr(f"finedetr.model.{name}", lambda *_: None)
        if not asked or not norms:
            monkeypatch.setattr("finedetr.model.layers.normalization", lambda *_: None)
        torch.manual_seed(0)
        detector = Detector(variant("dfine-n"), 3).to(memory_format=torch.channels_last).train()
        answers = detector(images).matching
        (answers.logits.sum() + answers.boxes.square().sum()).backward()
        result = {"logits": answers.logits.detach(), "boxes": answers.boxes.detach(), **dict(detector.named_buffers())}
        if not norms:  # behind forty norms and ReLUs a rounding grows to percents of some gradients, in any library
            result |= {
                name: parameter.grad
                for name, parameter in detector.named_parameters()
                if parameter.grad is not None and not name.startswith("backbone")
            }
        results.append(result)
    assert results[0].keys() == results[1].keys()
    for name, mine in results[0].items():
        size = float(results[1][name].abs().max())
        torch.testing.assert_close(mine, results[1][name], atol=2e-4 * max(size, 1e-2), rtol=0, msg=name)


def test_defaults_of_torch_do_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        test_attention.test_attention_is_that_of_plain_torch(torch.bfloat16, 16, 75, 33)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_detector_that_is_bfloat16_throughout_trains() -> None:
    torch.manual_seed(0)
    detector = Detector(variant("dfine-n"), 3).to(torch.bfloat16, memory_format=torch.channels_last).train()
    answers = detector(torch.rand(2, 3, 64, 64).bfloat16()).matching
    answers.logits.float().sum().backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
