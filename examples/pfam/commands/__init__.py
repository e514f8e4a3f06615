"""The subcommands: each module's ``register(commands)`` adds its parser, whose ``run(options)`` is the exit status."""
