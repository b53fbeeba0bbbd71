"""A run that is killed again and again, by the code of `benchmarks/kills.py`, for `support.runs.ForkServer`.

support.kill_worker:main FOLDER      prints the differences to an undisturbed run; leaves FOLDER/undisturbed, FOLDER/killed
"""

import json
import sys
from pathlib import Path

from support.helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from kills import Kill, train
from run_differences import differences

SETTINGS = ["iterations=3", "checkpoint.every=1", "checkpoint.keep=1", "evaluation.every=0", "checkpoint.keep_best=false"]
# Each comes to the run that goes on after the one before.
KILLS = (
    Kill("operation", 1, on="00000/001.png"),  # in the pictures of the base
    Kill("operation", 4, on="report.html."),  # before the second report is renamed: the second checkpoint is there
    Kill("operation", 1, on="trained.json."),  # the last checkpoint is there, what is handed out is not, nothing is pruned
    Kill("operation", 2, on="summary.json."),
)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0])
    killed = root / "killed"
    for folder, kill in ((root / "undisturbed", None), *((killed, kill) for kill in KILLS), (killed, None)):
        ended = train(folder, 1, kill, SETTINGS)
        if ended.statuses != [-9 if kill else 0]:
            print(f"{kill} ended with {ended.statuses}: {ended.printed}")
            return 1
    print(json.dumps(differences(killed, root / "undisturbed")))
    return 0
