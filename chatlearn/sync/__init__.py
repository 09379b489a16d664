"""Weight sync: a plan of transfers between two sharded layouts, and its execution."""
