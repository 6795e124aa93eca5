"""Everything that a person sees of a run: metrics, progress, rollout records, the report. See docs/metrics.md."""
