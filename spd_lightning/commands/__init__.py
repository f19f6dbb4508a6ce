"""The verbs of the command line, a module each; `cli` calls their `main`."""
