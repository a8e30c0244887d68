"""The cross-batch memory: the ring, its wrap, and taking a write back."""

import pytest
import torch

from fastirt.objective.cross_batch_memory import CrossBatchMemory


def test_ring_keeps_the_newest_entries_and_wraps_in_the_middle_of_a_batch():
    memory = CrossBatchMemory(10, 2)
    stream = torch.arange(28).float()
    for start in range(0, 28, 4):
        values = stream[start : start + 4]
        written = memory.enqueue(values[:, None].expand(-1, 2), values.long())
        assert torch.equal(memory.labels[written.slots], values.long())
        newest = set(range(max(0, start + 4 - 10), start + 4))
        assert {int(v) for v in memory.labels if v >= 0} == newest
    assert memory.pointer == 28 % 10
    assert torch.equal(memory.embeddings[:, 0].long(), memory.labels)


def test_empty_slots_are_labelled_minus_one():
    memory = CrossBatchMemory(5, 3)
    memory.enqueue(torch.ones(2, 3), torch.tensor([7, 8]))
    assert memory.labels.tolist() == [7, 8, -1, -1, -1]


@pytest.mark.parametrize("when", [True, False])
def test_undo(when):
    memory = CrossBatchMemory(6, 2)
    memory.enqueue(torch.ones(4, 2), torch.arange(4))
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    written = memory.enqueue(torch.full((4, 2), float("nan")), torch.arange(4, 8))
    memory.rollback(written, torch.tensor(when))
    same = all(torch.equal(before[name], value) for name, value in memory.state_dict().items())
    assert same == when


def test_a_batch_larger_than_the_ring_is_an_error():
    with pytest.raises(ValueError, match="batch of 4"):
        CrossBatchMemory(3, 2).enqueue(torch.ones(4, 2), torch.arange(4))


def test_bf16_memory_stores_rounded_values_without_gradient():
    memory = CrossBatchMemory(4, 2, torch.bfloat16)
    memory.enqueue(torch.tensor([[0.1, 0.2]], requires_grad=True), torch.tensor([1]))
    assert memory.embeddings.dtype == torch.bfloat16 and not memory.embeddings.requires_grad
    assert memory.embeddings[0].tolist() == torch.tensor([0.1, 0.2]).bfloat16().tolist()


@pytest.mark.parametrize("size, parts", [(10, 1), (10, 3), (11, 4), (5, 4), (3, 4)])
def test_parts_hold_together_what_one_ring_holds(size, parts):
    """Also where a batch wraps, is taken back, and where a part has no slot at all."""
    whole = CrossBatchMemory(size, 2)
    ring = [CrossBatchMemory(size, 2, shard=shard, num_shards=parts) for shard in range(parts)]
    stream = torch.arange(1, 40).float()
    for number, start in enumerate(range(0, 36, 3)):
        values = stream[start : start + 3]
        for memory in (whole, *ring):
            written = memory.enqueue(values[:, None].expand(-1, 2), values.long())
            memory.rollback(written, torch.tensor(number % 4 == 3))
        assert torch.equal(torch.cat([part.labels for part in ring]), whole.labels)
        assert torch.equal(torch.cat([part.embeddings for part in ring]), whole.embeddings)
        assert all(part.pointer == whole.pointer for part in ring)
    slots = torch.arange(size)
    for part in ring:
        rows = part.local_rows(slots)
        assert torch.equal(rows[rows >= 0], torch.arange(len(part)))
        assert torch.equal(slots[rows >= 0] - part.first, rows[rows >= 0])
