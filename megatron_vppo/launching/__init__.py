"""From settings to the jobs of a cluster: what a run would be there, computed before anything starts."""
