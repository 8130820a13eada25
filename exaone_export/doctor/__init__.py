"""What this machine can run: told by loading things, each in a process of its own that may crash or hang."""
