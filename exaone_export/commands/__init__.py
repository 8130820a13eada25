"""One module per subcommand: its docstring is the help, `add_arguments` its flags, `run` one library call."""
