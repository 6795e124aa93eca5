"""`vppo sweep`: variants of a configuration over seeds, run one after the other, and compared question by question."""
