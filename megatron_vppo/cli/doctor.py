"""`vppo doctor`: what this machine and environment can do, what is wrong with them, and how to mend it."""

from __future__ import annotations

from megatron_vppo.cli.output import say
from megatron_vppo.setup.diagnosis import diagnose


def run_doctor() -> int:
    """Prints the findings. Returns status 1 if one of them is a problem."""
    problems = 0
    for title, findings in diagnose().items():
        say(title)
        for finding in findings:
            problems += finding.level == "problem"
            say(f"  {finding.level:<8} {finding.text}")
    say(f"{problems} problem{'' if problems == 1 else 's'}")
    return int(problems > 0)
