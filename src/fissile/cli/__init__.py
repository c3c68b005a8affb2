"""The `fissile` command: one module per subcommand; nothing else in the package prints."""
