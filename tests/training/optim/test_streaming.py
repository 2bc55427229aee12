"""Slices through a device: no buffer is read before it arrived, or reused before its copy ended."""

from typing import Any

import pytest
import torch

from dpo_cache.training.optim.streaming import NUM_PAIRS, Pieces, PlainTransfer, SliceStream, transfer_to


class FakeTransfer:
    """Copies on the CPU at the worst moment: with `is_late` when they are waited for, else when they start.

    A buffer has other values from the start of a copy into it until that copy is waited for.
    """

    def __init__(self, *, is_late: bool = True):
        self.is_late, self.log, self.sizes = is_late, list[str](), list[int]()
        self.num_copies = 0

    def buffers(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.sizes.append(num_bytes)
        return tuple(torch.full((num_bytes,), 0xFF, dtype=torch.uint8) for _ in range(2))  # type: ignore[return-value]

    def start_up(self, device: torch.Tensor, host: torch.Tensor) -> Any:
        return self._start("up", device, host)

    def arrive(self, copy: Any) -> None:
        self._end(*copy)

    def start_down(self, host: torch.Tensor, device: torch.Tensor) -> Any:
        return self._start("down", host, device)

    def wait(self, copy: Any) -> None:
        self._end(*copy)

    def _start(self, way: str, target: torch.Tensor, source: torch.Tensor) -> Any:
        self.num_copies += 1
        number = (self.num_copies + 1) // 2
        self.log.append(f"{way} {number}")
        content = source if self.is_late else source.clone()
        target.fill_(0xFF)
        return way, number, target, content

    def _end(self, way: str, number: int, target: torch.Tensor, content: torch.Tensor) -> None:
        self.log.append(f"{way} {number} ended")
        target.copy_(content)


def slices(count: int) -> list[Pieces]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "value": torch.randn(size, generator=generator),
            "fixed": torch.randn(size, generator=generator).bfloat16(),
            "count": torch.arange(size),
        }
        for size in (5 + 3 * number for number in range(count))
    ]


def double(pieces: Pieces) -> None:
    pieces["value"].mul_(2).add_(pieces["fixed"])
    pieces["count"].add_(1)
    pieces["fixed"].zero_()


def passed(transfer: Any, count: int = 7) -> list[Pieces]:
    found, stream = slices(count), SliceStream(transfer)
    for pieces in found:
        stream.run(pieces, double, unchanged=("fixed",))
    stream.finish()
    return found


def are_right(found: list[Pieces]) -> bool:
    return all(
        torch.equal(one["value"], 2 * before["value"] + before["fixed"])
        and torch.equal(one["count"], before["count"] + 1)
        and torch.equal(one["fixed"], before["fixed"])
        for one, before in zip(found, slices(len(found)), strict=True)
    )


TRANSFERS = [FakeTransfer(), FakeTransfer(is_late=False), PlainTransfer(torch.device("cpu"))]


@pytest.mark.parametrize("transfer", TRANSFERS, ids=["late", "early", "plain"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_every_slice_is_changed_and_comes_back(transfer: Any, count: int) -> None:
    assert are_right(passed(transfer, count))


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("skipped", ["arrive", "wait"])
def test_a_missing_wait_would_be_seen(skipped: str, is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTransfer, skipped, lambda *_: None)
    assert not are_right(passed(FakeTransfer(is_late=is_late)))


@pytest.mark.parametrize("is_late", [True, False])
def test_a_buffer_that_is_reused_too_early_would_be_seen(
    is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = SliceStream._return
    held: list[Any] = []

    def late(stream: SliceStream, pair: Any) -> None:
        held.append((stream, pair))  # only in the end

    monkeypatch.setattr(SliceStream, "_return", late)
    found, stream = slices(5), SliceStream(FakeTransfer(is_late=is_late))
    for pieces in found:
        stream.run(pieces, double, unchanged=("fixed",))
    for each, pair in held:
        back(each, pair)
    assert not are_right(found)


def test_the_next_slice_is_on_its_way_before_the_last_one_is_waited_for() -> None:
    transfer = FakeTransfer()
    passed(transfer, 4)
    assert transfer.log == [
        *("up 1", "up 1 ended", "down 1", "up 2", "up 2 ended", "down 2"),
        *("down 1 ended", "up 3", "up 3 ended", "down 3"),
        *("down 2 ended", "up 4", "up 4 ended", "down 4", "down 3 ended", "down 4 ended"),
    ]


def test_buffers_are_made_once_and_grow_with_the_slices() -> None:
    same, growing = FakeTransfer(), FakeTransfer()
    stream = SliceStream(same)
    for _ in range(10):
        stream.run({"value": torch.zeros(100)}, lambda pieces: None)
    assert len(same.sizes) == NUM_PAIRS and set(same.sizes) == {512}  # 400 bytes, aligned
    stream = SliceStream(growing)
    values = [torch.full((size,), float(size)) for size in (1, 1, 1000, 1, 2000, 3)]
    for value in values:
        stream.run({"value": value}, lambda pieces: pieces["value"].neg_())
    stream.finish()
    assert growing.sizes == [256, 256, 4096, 8192][: len(growing.sizes)] and len(growing.sizes) == 4 - 0
    assert all(bool((value == -value.numel()).all()) for value in values)


def test_other_devices_than_cuda_copy_plainly() -> None:
    assert isinstance(transfer_to(torch.device("mps")), PlainTransfer)
