"""The programs of tools/ and of the example import their parts by the names that they have in their own folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples" / "digits_cpu")]
