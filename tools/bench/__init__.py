"""How long a step of the real training command takes, and what it could take at best."""
