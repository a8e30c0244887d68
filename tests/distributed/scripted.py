"""One rank of several, to which a test says what the others send."""

from fastirt.distributed.host_channel import HostChannel
from fastirt.distributed.ranks import Ranks


class ScriptedChannel(HostChannel):
    """`answers` turns this rank's value into the values of all ranks."""

    def __init__(self, rank, world_size, answers):
        super().__init__(rank, world_size)
        self.answers = answers

    def gather_json(self, value):
        return self.answers(value)

    def barrier(self): ...


def ranks_with(world_size, answers, rank=0):
    ranks = Ranks(rank, world_size)
    ranks.host = ScriptedChannel(rank, world_size, answers)
    return ranks
