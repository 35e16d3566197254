"""One module per subcommand; a module is imported when its subcommand is called."""
