"""The command line. Begin with `app`: it is the program, and `commands/` holds one file for each command."""
