"""The program that makes the example's model imports its parts by the names that they have in its folder."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "tools")]
