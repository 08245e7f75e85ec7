"""Everyone's calls of one problem: judged when they are prepared, timed together."""

from collections.abc import Callable, Mapping
from functools import cached_property

from problem import Calls
from timing import measure


def clock() -> float:
    """pytest-benchmark's clock in these tests: it stands still, but for what was measured."""
    return clock.now


clock.now = 0.0


class Contest:
    def __init__(
        self,
        entrants: Mapping[str, Callable[[], tuple[Calls, dict[str, float]]]],
        directions: tuple[str, ...],
        rounds: int,
    ) -> None:
        """Each entrant prepares its calls and says their errors; those who cannot are put aside."""
        self.directions, self.rounds = directions, rounds
        self.calls: dict[str, Calls] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.failures: dict[str, Exception] = {}
        for who, prepare in entrants.items():
            try:
                self.calls[who], self.errors[who] = prepare()
            except Exception as error:  # the others can still be compared; its own tests raise it
                self.failures[who] = error

    @cached_property
    def seconds(self) -> dict[tuple[str, str], list[float]]:
        keys = [(who, direction) for who in self.calls for direction in self.directions]
        return measure({key: getattr(self.calls[key[0]], key[1]) for key in keys}, self.rounds)

    def report(self, benchmark, who: str, direction: str) -> None:
        """Hand what was measured to pytest-benchmark, round by round."""
        if who in self.failures:
            raise self.failures[who]
        benchmark.extra_info |= {"who": who, "direction": direction, "errors": self.errors[who]}
        seconds = [0.0] if benchmark.disabled else self.seconds[who, direction]
        left = iter(seconds)

        def pass_time() -> None:
            clock.now += next(left)

        benchmark.pedantic(pass_time, rounds=len(seconds))
