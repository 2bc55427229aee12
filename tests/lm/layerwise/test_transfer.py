import pytest
import torch

from dpo_cache.lm.layerwise.transfer import PlainTransfer, Ring, Shelf, ThreadTransfer, Transfer
from tests.lm.layerwise.transfers import FakeTransfer

CPU = torch.device("cpu")


def filler(value: int):
    return lambda target: target.fill_(value)


def refuse(_: torch.Tensor) -> None:
    raise OSError("the disk is gone")


@pytest.fixture(params=[FakeTransfer, ThreadTransfer, lambda: PlainTransfer(CPU)])
def transfer(request: pytest.FixtureRequest):
    transfer: Transfer = request.param()
    yield transfer
    transfer.close()


def test_a_slot_holds_what_was_fetched_last_and_is_kept_while_it_is_open(transfer: Transfer) -> None:
    ring = Ring(transfer)
    ring.fetch("a", 3, filler(1))
    one = ring.open("a")
    ring.fetch("b", 5, filler(2))
    ring.fetch("b", 5, refuse)  # on its way already
    assert one.tolist() == [1] * 3
    two = ring.open("b")
    assert one.tolist() == [1] * 3 and two.tolist() == [2] * 5
    ring.close("a")
    ring.fetch("c", 2, filler(3))
    assert two.tolist() == [2] * 5 and ring.open("c").tolist() == [3, 3]
    assert (ring.num_fetches, ring.num_bytes) == (3, 10)


def test_two_slots_serve_any_number_of_layers(transfer: Transfer) -> None:
    ring = Ring(transfer)
    slots = set()
    for key in range(6):
        ring.fetch(key, 4, filler(key))
        opened = ring.open(key)
        ring.fetch(key + 1, 4, filler(key + 1))
        assert opened.tolist() == [key] * 4
        slots.add(opened.data_ptr())
        ring.close(key)
    assert len(slots) == 2 and ring.num_fetches == 7


def test_slots_of_the_size_of_the_largest_layer_are_made_once() -> None:
    transfer = FakeTransfer()
    ring = Ring(transfer)
    ring.slot_bytes = 9
    for key, num_bytes in enumerate((3, 2, 9, 4)):
        ring.fetch(key, num_bytes, filler(key))
        assert ring.open(key).tolist() == [key] * num_bytes
        ring.close(key)
    assert len(transfer.targets) == 2 and transfer.sent == [3, 2, 9, 4]


def test_what_is_there_is_not_fetched_again_unless_its_home_changed(transfer: Transfer) -> None:
    ring = Ring(transfer)
    ring.fetch("a", 2, filler(1))
    ring.open("a")
    ring.close("a")
    ring.fetch("a", 2, filler(7))
    assert ring.open("a").tolist() == [1, 1]
    ring.close("a")
    ring.forget("a")
    ring.fetch("a", 2, filler(7))
    assert ring.open("a").tolist() == [7, 7]


def test_a_shelf_keeps_all_and_fetches_again_what_changed(transfer: Transfer) -> None:
    shelf = Shelf(transfer)
    for key in range(4):
        shelf.fetch(key, 3, filler(key))
    flats = [shelf.open(key) for key in range(4)]
    assert [flat.tolist() for flat in flats] == [[key] * 3 for key in range(4)]
    shelf.forget(2)
    for key in range(4):
        shelf.close(key)
        shelf.fetch(key, 3, filler(9))
    assert [shelf.open(key).tolist() for key in range(4)] == [[0] * 3, [1] * 3, [9] * 3, [3] * 3]
    assert shelf.open(2).data_ptr() == flats[2].data_ptr()
    assert (shelf.num_fetches, shelf.num_bytes) == (5, 15)


@pytest.mark.parametrize("kind", [Ring, Shelf])
def test_a_failed_fetch_raises_where_the_content_is_needed_and_can_be_tried_again(kind: type[Ring]) -> None:
    transfer = ThreadTransfer()
    ring = kind(transfer)
    ring.fetch("a", 2, refuse)
    with pytest.raises(OSError, match="the disk is gone"):
        ring.open("a")
    ring.fetch("a", 2, filler(1))
    assert ring.open("a").tolist() == [1, 1]
    transfer.close()


def test_the_fake_shows_a_read_before_the_arrival_and_a_slot_that_is_used_again() -> None:
    transfer = FakeTransfer()
    target = torch.zeros(8, dtype=torch.uint8)
    wait = transfer.send(0, target, filler(0))
    assert target.view(torch.float32).isnan().all()
    wait()
    assert target.view(torch.float32).tolist() == [0, 0]
    transfer.send(0, target, filler(0))
    assert target.view(torch.float32).isnan().all()
