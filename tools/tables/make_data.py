"""Writes the data set of tables of digits: `problem`, `answer`, `images` rows in train.parquet and val.parquet.

    python tools/tables/make_data.py --out build/tables/data

Training and held-out images share no scan. `labels.json` says which scans and digits each row shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits.make_data import main

from tables.table import TABLE

if __name__ == "__main__":
    main(TABLE, noun="tables", description=__doc__)
