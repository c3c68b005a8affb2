"""What is resident under a budget of bytes: the bookkeeping between a policy and who loads."""

from __future__ import annotations

from collections.abc import Container

from fissile.serve.policies import Key, Policy


class ExpertCache:
    """Resident keys, their bytes, and room for more.

    Args:
        capacity: bytes, at least 0.
        policy: chooses what leaves.

    Attributes:
        used: bytes resident now; never above the capacity.
        peak: the most there were.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        self.capacity, self.policy = capacity, policy
        self.used, self.peak = 0, 0
        self._size: dict[Key, int] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._size

    def __len__(self) -> int:
        return len(self._size)

    def admit(
        self,
        key: Key,
        size: int,
        *,
        keep: Container[Key] = (),
        deadline: float | None = None,
    ) -> list[Key] | None:
        """Make room for a key and count it as resident.

        Args:
            key: not resident.
            size: its bytes.
            keep: keys that must not leave.
            deadline: the key is needed at this time only; then nothing leaves that is due earlier
                or at that time.

        Returns:
            What left; None, and nothing changed, where there is no such room.
        """
        leaving = self._leaving(size, keep, deadline)
        if leaving is None:
            return None
        for victim in leaving:
            self.drop(victim)
        self.policy.add(key)
        self._size[key] = size
        self.used += size
        self.peak = max(self.peak, self.used)
        return leaving

    def drop(self, key: Key) -> None:
        """Give a key up.

        Raises:
            KeyError: it is not resident.
        """
        self.policy.remove(key)
        self.used -= self._size.pop(key)

    def _leaving(self, size: int, keep: Container[Key], deadline: float | None) -> list[Key] | None:
        missing = self.used + size - self.capacity
        leaving: list[Key] = []
        if size > self.capacity:
            return None
        while missing > 0:
            victim = self.policy.victim(keep, leaving, deadline)
            if victim is None:
                return None
            leaving.append(victim)
            missing -= self._size[victim]
        return leaving
