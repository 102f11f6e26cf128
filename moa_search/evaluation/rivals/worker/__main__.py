"""Run by its folder's path, which makes no package of it: the folder around it has to be on Python's path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from worker.command import main  # type: ignore[import-not-found]

    main()
