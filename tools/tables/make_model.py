"""Makes the model of the tables: a Qwen-VL of 2.5 M parameters that is right about some of the held-out images.

    python tools/tables/make_model.py --data build/tables/data --start build/digits/model --out build/tables/model

It begins with the model of the pairs of digits, which has learned to see. The result is an ordinary Hugging Face
folder, which transformers and vLLM load.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits.make_model import main

from tables.table import TABLE

if __name__ == "__main__":
    main(TABLE, from_model=True, batch=32, misread_share=0.5, lr=1e-3, description=__doc__)
