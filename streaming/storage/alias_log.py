"""Where the aliases point: a log of moves, of which each is an object that is created once.

Who moves an alias creates the object after the last one. Of several who do so at once one succeeds, and the others look
at its move before they try the next number, so that no move is lost and each knows what it moved the alias from.
"""

from collections.abc import Callable, Sequence
from uuid import uuid4

from models.errors import ModelError
from streaming.storage.numbered import numbered
from streaming.storage.registry_objects import ALIAS_LOG, MOVE_DIGITS, LoggedMove, Move, move_key, read_all
from streaming.storage.store import Store


class AliasLog:
    """The moves in a store, as far as they were read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._moves: list[Move] = []

    def follow(self) -> Sequence[Move]:
        """Every move, oldest first. Where nothing moved since the last call, one object is asked for, and not there.

        Raises:
            ModelError: an object is damaged; or, when the log is read from its beginning, one is missing.
        """
        if not self._moves:
            keys = [move_key(number) for number in range(1, self._count() + 1)]
            for data in read_all(self._store, keys):
                if data is None:  # removed since it was listed
                    break
                self._take(data)
        while (data := self._store.get(move_key(len(self._moves) + 1))) is not None:
            self._take(data)
        return self._moves

    def append(self, make: Callable[[Sequence[Move]], Move]) -> Move:
        """Add the move that `make` gives for the moves before it; it is asked again where another one came first.

        Raises:
            ModelError: as for `follow`, or the move cannot be stored.
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

    def _take(self, data: bytes) -> None:
        place = f"{self._store.place}/{move_key(len(self._moves) + 1)}"
        self._moves.append(LoggedMove.from_bytes(data, place).move)

    def _count(self) -> int:
        """The number of moves that a listing shows."""
        found = sorted(number for number, _ in numbered(self._store, ALIAS_LOG, MOVE_DIGITS))
        for expected, number in enumerate(found, start=1):
            if number != expected:
                raise ModelError(
                    f"{self._store.place}/{move_key(expected)} is missing, and later moves of the aliases are there: "
                    "restore it from a backup"
                )
        return len(found)
