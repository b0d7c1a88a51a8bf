"""The commands of `parl`, one module each with `run(arguments) -> exit status`."""
