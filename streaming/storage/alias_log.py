"""The log of alias moves, in which each move is an object that is created once.

To move an alias, a process creates the object after the last one. If several processes do so at the same time, one
succeeds, and the others read its move before they try the next number, so that no move is lost and each process knows
the previous version.
"""

from collections.abc import Callable, Sequence
from uuid import uuid4

from models.errors import ModelError
from streaming.storage.numbered import numbered
from streaming.storage.registry_objects import ALIAS_LOG, MOVE_DIGITS, LoggedMove, Move, move_key, read_all
from streaming.storage.store import Store


class AliasLog:
    """Reads and appends the moves in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._moves: list[Move] = []

    def follow(self) -> Sequence[Move]:
        """All moves, oldest first. If there is no new move since the last call, this takes one request.

        Raises:
            ModelError: an object is damaged, or, when the log is read from its beginning, missing.
        """
        if not self._moves:
            keys = [move_key(number) for number in range(1, self._count() + 1)]
            for data in read_all(self._store, keys):
                if data is None:  # deleted after it was listed
                    break
                self._append(data)
        while (data := self._store.get(move_key(len(self._moves) + 1))) is not None:
            self._append(data)
        return self._moves

    def append(self, make: Callable[[Sequence[Move]], Move]) -> Move:
        """Append a move.

        Args:
            make: returns the move, given all previous ones; called again if another process was first.

        Raises:
            ModelError: see `follow`; or the move cannot be stored.
        """
        if self._count() < len(self._moves):  # the home was restored from a backup
            self._moves = []
        while True:
            moves = self.follow()
            move = make(moves)
            content = LoggedMove(**dict(move), nonce=uuid4().hex).to_bytes()
            if self._store.create(move_key(len(moves) + 1), content):
                self._moves.append(move)
                return move

    def _append(self, data: bytes) -> None:
        place = f"{self._store.place}/{move_key(len(self._moves) + 1)}"
        self._moves.append(LoggedMove.from_bytes(data, place).move)

    def _count(self) -> int:
        """The number of moves in a listing."""
        found = sorted(number for number, _ in numbered(self._store, ALIAS_LOG, MOVE_DIGITS))
        for expected, number in enumerate(found, start=1):
            if number != expected:
                raise ModelError(
                    f"{self._store.place}/{move_key(expected)} is missing, but later moves of the aliases exist: "
                    "restore it from a backup"
                )
        return len(found)
