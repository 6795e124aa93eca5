"""The parts of a run, built from its settings and this machine. Every wing that needs a run starts here."""
