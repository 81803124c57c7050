"""Where everything lies: a store of small objects, the home, the Delta tables, their logs and files."""
