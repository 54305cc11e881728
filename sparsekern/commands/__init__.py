"""One file a command: `EXAMPLE` and `command`, a thin door that reads arguments, calls, and prints a table or JSON."""
