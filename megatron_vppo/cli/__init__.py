"""The command `vppo`: parses arguments, calls a wing, prints what comes back. main.py has the subcommands."""
