"""One self-contained HTML page about a run: `write_report(run_dir)`."""

from megatron_vppo.observability.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
