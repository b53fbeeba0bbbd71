"""What watches over a run's numbers: what is skipped, what ends the run, and what is only warned of.

    samples.py      samples whose numbers are not finite, found on the device: they are left out of the update
    faults.py       what faults.jsonl says of numbers that were not finite
    limits.py       how far KL, drift and held-out scores may go, keys of the section `guard`
    collapse.py     signs that a run learns nothing any more, with their likely causes
    watch.py        `Guards`, which a trainer asks for all of that

Per step and per batch nothing waits for the device: counts are kept there, and read once an iteration.
"""

from fastgrpo.guards.faults import Fault
from fastgrpo.guards.limits import LimitPassed
from fastgrpo.guards.watch import Guards

__all__ = ["Fault", "Guards", "LimitPassed"]
