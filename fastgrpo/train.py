"""`deepspeed fastgrpo/train.py --config ...`: the door for launchers, which start a file. See `fastgrpo.commands.train`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a file, the package's own folder comes first on the path, where its modules would pass for top-level ones.
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    sys.path.insert(1, str(root / "kernels"))

from fastgrpo.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
