"""The ceilings of a GPU: its fastest product, memory and links, from a data sheet or from a measurement.

A known GPU (GPUS) has the peaks of the vendor's data sheet and an assumed share of each that programs reach. A file of
`tools/bench/ceilings.py` has what was measured. docs/plan.md says where the numbers come from.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class GpuCeilings:
    """The speeds that large operations reach, per GPU."""

    name: str
    peak_flops: float
    """FLOP/s of dense bfloat16 products by the data sheet, of which MFU is a share; for a measured device its fastest
    product."""
    product_flops: float
    """FLOP/s of the product of large matrices."""
    memory: float
    """Bytes/s of the device's memory, read and written together."""
    node: float | None
    """Bytes/s of a collective within a host, counted as bus bandwidth (NCCL's tests); None: not measured."""
    network: float | None
    """Bytes/s between hosts; None: not measured."""
    to_host: float
    """Bytes/s between the device and host memory, while all GPUs of the host copy."""
    is_measured: bool
    """True if the ceilings were measured, False if they are assumed shares of a data sheet."""


# --- Data sheets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSheet:
    """The vendor's peaks, in the units of the sheet."""

    name: str
    bf16_tflops: float
    """10^12 FLOP/s of tensor cores, dense: half of the number with sparsity."""
    memory_gb: float
    """GB/s."""
    nvlink_gb: float
    """GB/s, both directions together."""
    network_gbit: float
    """Gbit/s of the network adapter that the vendor's own machine (DGX, HGX) has for each GPU, one direction."""
    pcie_gb: float
    """GB/s, one direction."""


@dataclass(frozen=True)
class Reached:
    """The share of each peak that programs reach."""

    product: float
    memory: float = 0.87
    """Measured on an H200: 4,194 of 4,800 GB/s in a copy (docs/LOG.md, 2026-11-29)."""
    node: float = 0.8
    """A guess: the bus bandwidth of NCCL's large all-reduces over one direction of NVLink."""
    network: float = 0.9
    """A guess."""
    to_host: float = 0.4
    """A guess for eight GPUs that copy at once: they share the host's memory."""


HOPPER = Reached(product=0.75)
"""Measured on an H200: 744 and 767 of 989 TFLOP/s in the fastest square product (docs/LOG.md, 2026-11-29). The best
shape of others reaches 0.80 (mamf-finder's table, github.com/stas00/ml-engineering)."""
AMPERE = Reached(product=0.80)
"""A guess by the same discount. The best single shape reaches 0.86 (the same table)."""

SHEETS = {
    "h100": (DataSheet("H100 SXM", 989.4, 3350, 900, 400, 64), HOPPER),
    "h800": (DataSheet("H800 SXM", 989.4, 3350, 400, 400, 64), HOPPER),
    "h200": (DataSheet("H200 SXM", 989.4, 4800, 900, 400, 64), HOPPER),
    "a100": (DataSheet("A100 SXM 80 GB", 312, 2039, 600, 200, 32), AMPERE),
}
"""The GPUs that `--gpu` knows by name: NVIDIA's data sheets, and the shares that are assumed of them."""


def gpu_of_sheet(sheet: DataSheet, reached: Reached) -> GpuCeilings:
    return GpuCeilings(
        name=sheet.name,
        peak_flops=sheet.bf16_tflops * TERA,
        product_flops=reached.product * sheet.bf16_tflops * TERA,
        memory=reached.memory * sheet.memory_gb * GIGA,
        node=reached.node * sheet.nvlink_gb / 2 * GIGA,
        network=reached.network * sheet.network_gbit / 8 * GIGA,
        to_host=reached.to_host * sheet.pcie_gb * GIGA,
        is_measured=False,
    )


GPUS = {name: gpu_of_sheet(*sheet) for name, sheet in SHEETS.items()}


# --- Measured ceilings ------------------------------------------------------------------------------------------------

MEASURED = ("product_tflops", "memory_gb_per_s", "to_host_gb_per_s")
LINKS = ("node_gb_per_s", "network_gb_per_s")
"""The fields of a file of ceilings, besides `name`. A link may be null: nothing was there to measure it."""


def gpu_named(text: str) -> GpuCeilings:
    """Returns the GPU of `--gpu`: one of GPUS by name, or the ceilings of a JSON file.

    Raises:
        ValueError: neither of the two, or a file that lacks a number.
    """
    if text.lower() in GPUS:
        return GPUS[text.lower()]
    if not Path(text).is_file():
        raise ValueError(
            f"--gpu {text}: no file of measured ceilings (tools/bench/ceilings.py writes one), and not one of "
            f"{', '.join(GPUS)}"
        )
    return _measured(text)


def _measured(path: str) -> GpuCeilings:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--gpu {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--gpu {path}: not a JSON object of ceilings")
    product, memory, to_host = (_speed(path, values, name) for name in MEASURED)
    node, network = (None if values.get(name) is None else _speed(path, values, name) for name in LINKS)
    return GpuCeilings(
        name=str(values.get("name", Path(path).stem)),
        peak_flops=product * TERA,
        product_flops=product * TERA,
        memory=memory * GIGA,
        node=None if node is None else node * GIGA,
        network=None if network is None else network * GIGA,
        to_host=to_host * GIGA,
        is_measured=True,
    )


def _speed(path: str, values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"--gpu {path}: {name} is {value!r}, not a number above 0")
    return float(value)


def link_refusal(gpu: GpuCeilings, *, gpus: int, hosts: int) -> str | None:
    """Names the field of a link that a cluster needs and that was not measured; None: all are there."""
    if gpus > 1 and gpu.node is None:
        return f"node_gb_per_s is null, but {gpus} GPUs talk to each other"
    if hosts > 1 and gpu.network is None:
        return f"network_gb_per_s is null, but there are {hosts} hosts"
    return None
