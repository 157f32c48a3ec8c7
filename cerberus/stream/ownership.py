"""A partition that this process owns: the prefix, and the state of its rows in the online store."""

import dataclasses

from cerberus import partition
from cerberus.features import evaluation, fences
from cerberus.online import partition_states


class Owned:
    """A pure partition and its owner's bookkeeping.

    Args:
        part: The windows at a prefix.
        rebuilding: Whether a new epoch is being read from the log's start.
        restoring: Whether rows must be sent again, because the online store lacks some.

    Attributes:
        trail: What the last write of its rows left beside them.
        unloaded: Whether the online store has lost the credit scores.
        caught_up_ms: Wall clock at which the prefix last was the whole log; None before.
    """

    def __init__(
        self, part: partition.Partition, *, rebuilding: bool = False, restoring: bool = False
    ) -> None:
        self.part = part
        self.rebuilding = rebuilding
        self.restoring = restoring
        self.trail = partition_states.Trail()
        self.unloaded = False
        self.caught_up_ms: int | None = None

    def follow(self, last: fences.PartitionState | None, now_ms: int) -> bool:
        """Continue from the former owner's last state; return whether it left nothing to restore.

        Its trail does not show what it had not finished.
        """
        if last is not None:
            # The former owner's clock may be fast.
            self.caught_up_ms = max(self.caught_up_ms or 0, min(last.caught_up_ms, now_ms))
            if last.epoch >= self.part.since_epoch:  # a replay may not reach back so far
                self.part.split_ms = max(self.part.split_ms, last.split_ms)
        finished = last is not None and last.state == fences.LIVE
        if not finished:
            self.lost_rows()
        return finished

    def reached_end(self, asked_ms: int) -> None:
        """Note that the prefix is the whole log, as of a question asked at `asked_ms`."""
        self.caught_up_ms, self.rebuilding = asked_ms, False

    def lost_rows(self) -> None:
        """Note that the online store lacks rows of the prefix."""
        self.restoring = True

    def lost_trail(self) -> None:
        """Note that the online store knows neither the state nor the trail, so it lacks rows."""
        self.trail = partition_states.Trail()
        self.lost_rows()

    def restored(self) -> None:
        """Note that all rows of the prefix were sent again."""
        self.restoring = False

    def state(self) -> fences.PartitionState:
        """Return the state that readers of its rows need."""
        told = self.part.state()
        state = told.state
        if state == fences.LIVE and self.rebuilding:
            state = evaluation.Doubt.REBUILDING
        elif state == fences.LIVE and (self.restoring or self.unloaded):
            state = evaluation.Doubt.RESTORING
        return dataclasses.replace(told, state=state, caught_up_ms=self.caught_up_ms or 0)
